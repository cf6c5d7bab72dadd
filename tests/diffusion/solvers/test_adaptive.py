from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from octavo.diffusion import generators
from octavo.diffusion.solvers.adaptive import solve_adaptive
from octavo.errors import OctavoError


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_mean_and_variance_of_the_data_are_reached(
    hills_pipeline: Any, normal: Any, beta_schedule: str, prediction_type: str
) -> None:
    scheduler = DDIMScheduler(beta_schedule=beta_schedule, prediction_type=prediction_type)
    own = hills_pipeline(scheduler, normal, sample_size=64)
    size = 3 * 64 * 64
    solved = solve_adaptive(own, generators=generators(0, 0, 1), rtol=0.01)
    assert solved.evaluations == (len(own.unet.asked),) and solved.evaluations[0] < 600
    # the pipeline clips its images to [-1, 1]: quantiles are left alone by that
    numbers = np.sort(solved.images.flatten() * 2 - 1)
    low, middle, high = (numbers[int(q * size)] for q in (0.1587, 0.5, 0.8413))
    assert abs(middle - 0.3) < 4 * 1.25 * 0.5 / size**0.5
    assert abs((high - low) / 2 - 0.5) < 4 * 1.1 * 0.5 / size**0.5


def test_smaller_tolerances_take_more_evaluations(hills_pipeline: Any, hills: Any) -> None:
    own = hills_pipeline(DDIMScheduler(), hills)
    counts = [
        solve_adaptive(own, generators=generators(0, 0, 1), rtol=rtol).evaluations[0]
        for rtol in (0.1, 0.02, 0.005)
    ]
    assert counts[0] < counts[1] < counts[2]


def test_numbers_come_from_both_hills(hills_pipeline: Any, hills: Any) -> None:
    own = hills_pipeline(DDIMScheduler(), hills, sample_size=32)
    numbers = solve_adaptive(own, generators=generators(0, 0, 1)).images * 2 - 1
    share = float((numbers > -0.1).mean())  # the valley; 0.4 and 0.6 on its sides, to a hundredth
    assert share == pytest.approx(0.6, abs=0.04)


def test_image_k_depends_on_its_seed_alone(hills_pipeline: Any, hills: Any) -> None:
    own = hills_pipeline(DDIMScheduler(), hills)
    three = solve_adaptive(own, generators=generators(5, 0, 3), rtol=0.05)
    one = solve_adaptive(own, generators=generators(7, 0, 1), rtol=0.05)
    assert np.array_equal(three.images[2], one.images[0]) and three.evaluations[2] == one.evaluations[0]


def test_steps_are_those_of_algorithm_1(hills_pipeline: Any, normal: Any) -> None:
    """Against a plain transcription of the paper's loop, on whole arrays in NumPy."""
    own = hills_pipeline(DDIMScheduler(), normal, sample_size=4)
    solve_adaptive(own, generators=generators(9, 0, 1), rtol=0.05)
    alpha_bars = np.asarray(own.scheduler.alphas_cumprod.double())
    log_ratios, places = np.log((1 - alpha_bars) / alpha_bars), np.arange(1000)
    slopes = np.gradient(-np.log(alpha_bars)) * 999
    generator = torch.Generator().manual_seed(9)
    x = np.asarray(torch.randn((1, 3, 4, 4), generator=generator).double())
    asked, x_previous, t, h = [], x, 1.0, 0.01

    def score(x: np.ndarray, t: float) -> np.ndarray:
        alpha_bar = 1 / (1 + np.exp(np.interp(999 * t, places, log_ratios)))
        return -np.asarray(normal.noise(torch.from_numpy(x), alpha_bar)) / (1 - alpha_bar) ** 0.5

    while t > 0:
        z = np.asarray(torch.randn((1, 3, 4, 4), generator=generator, dtype=torch.float64))
        now, then = np.interp([999 * t, 999 * (t - h)], places, slopes)
        x1 = x + h * now * x / 2 + h * now * score(x, t) + (h * now) ** 0.5 * z
        x2 = x + h * then * x1 / 2 + h * then * score(x1, t - h) + (h * then) ** 0.5 * z
        x2 = (x1 + x2) / 2
        delta = np.maximum(2 / 256, 0.05 * np.maximum(abs(x1), abs(x_previous)))
        e = np.linalg.norm((x1 - x2) / delta) / x.size**0.5
        asked.append(999 * (t - h))
        if e <= 1:
            x, x_previous, t = x2, x1, t - h
        h = min(t, 0.9 * h * e**-0.9)
    theirs = [t for t in asked if t > 1e-6]
    ours = [t for t in own.unet.asked if t > 1e-6]
    assert len(theirs) > 10 and set(np.round(theirs, 1)) <= set(np.round(ours, 1))


def test_tolerances_are_checked(hills_pipeline: Any, hills: Any) -> None:
    own = hills_pipeline(DDIMScheduler(), hills)
    with pytest.raises(OctavoError, match=r"rtol: 0\.0 is not above 0"):
        solve_adaptive(own, generators=generators(0, 0, 1), rtol=0.0)
    with pytest.raises(OctavoError, match="max_evaluations"):
        solve_adaptive(own, generators=generators(0, 0, 1), max_evaluations=10)

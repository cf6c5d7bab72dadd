from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline

import octavo
from octavo.diffusion import call_pipeline, generators, probe
from octavo.diffusion.samplers import with_scheduler
from octavo.diffusion.solvers.predictor_corrector import PredictorCorrectorScheduler
from octavo.diffusion.trajectories import Trajectory, with_trajectory
from octavo.errors import OctavoError


def run(scheduler: Any, hills: Any, start: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """A run of all images at once, as a pipeline runs them, with the exact denoiser of `hills`."""
    generator = [torch.Generator().manual_seed(seed + k) for k in range(len(start))]
    state = start
    for t in scheduler.timesteps:
        noise = hills.noise(state, float(scheduler.alphas_cumprod[int(t)].double()))
        state = scheduler.step(noise, t, state, generator=generator).prev_sample
    return state


@pytest.mark.parametrize("corrector_steps", [0, 1, 3])
def test_it_is_algorithm_5(hills: Any, corrector_steps: int) -> None:
    """Against the paper's loop, on every timestep of a short schedule, image by image."""
    total, snr = 12, 0.3
    scheduler = PredictorCorrectorScheduler(
        total, beta_start=0.01, beta_end=0.3, snr=snr, corrector_steps=corrector_steps
    )
    scheduler.set_timesteps(total)
    start = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = run(scheduler, hills, start)
    assert len(scheduler.timesteps) == total + corrector_steps * (total - 1)
    betas = scheduler.betas.double()
    alpha_bars = scheduler.alphas_cumprod.double()
    for k, x in enumerate(start):
        generator = torch.Generator().manual_seed(1 + k)

        def z() -> torch.Tensor:
            return torch.randn((1, 1, 4, 4), generator=generator, dtype=torch.float64)[0]  # noqa: B023

        def score(x: torch.Tensor, i: int) -> torch.Tensor:
            return -hills.noise(x, float(alpha_bars[i])) / (1 - alpha_bars[i]).sqrt()

        for i in range(total - 1, -1, -1):
            x = (2 - (1 - betas[i]).sqrt()) * x + betas[i] * score(x, i)
            if i == 0:
                break
            x = x + betas[i].sqrt() * z()
            for _ in range(corrector_steps):
                noise, s = z(), score(x, i - 1)
                e = 2 * (1 - betas[i - 1]) * (snr * noise.norm() / s.norm()) ** 2
                x = x + e * s + (2 * e).sqrt() * noise
        torch.testing.assert_close(ours[k], x, rtol=1e-5, atol=1e-5)


def test_the_corrector_brings_numbers_from_a_wrong_start_to_the_data(normal: Any) -> None:
    """From noise of twice the size: without a corrector the variance stays too large, with it comes back."""
    off = []
    for corrector_steps in (0, 4):
        scheduler = PredictorCorrectorScheduler(corrector_steps=corrector_steps)
        scheduler.set_timesteps(100)
        start = 3 * torch.randn(1, 1, 100, 100, generator=torch.Generator().manual_seed(0))
        off.append(abs(float(run(scheduler, normal, start).std()) - 0.5))
    assert off[1] < 0.03 and off[1] < off[0]


def test_it_samples_saves_and_loads_like_any_other(pipeline: Any, tmp_path: Path) -> None:
    own = with_scheduler(pipeline, "predictor-corrector")
    assert type(own) is DDPMPipeline and type(own.scheduler) is PredictorCorrectorScheduler
    own.scheduler.register_to_config(snr=0.05, corrector_steps=2)
    own.save_pretrained(tmp_path)
    for loaded in (DiffusionPipeline.from_pretrained(tmp_path), octavo.load(tmp_path)):
        assert type(loaded.scheduler) is PredictorCorrectorScheduler
        assert (loaded.scheduler.config.snr, loaded.scheduler.config.corrector_steps) == (0.05, 2)
    assert type(with_scheduler(own, "ddim").scheduler).__name__ == "DDIMScheduler"
    assert with_scheduler(own, "predictor_corrector").scheduler.config.snr == 0.05


def test_image_k_depends_on_its_own_generator(pipeline: Any) -> None:
    own = with_scheduler(pipeline, "predictor_corrector")
    three = call_pipeline(own, generators=generators(5, 0, 3), num_inference_steps=4)
    one = call_pipeline(own, generators=generators(7, 0, 1), num_inference_steps=4)
    assert np.abs(three[2] - one[0]).max() < 1e-4 and np.abs(three[1] - one[0]).max() > 0.01


def test_a_trajectory_is_visited_each_level_twice(pipeline: Any) -> None:
    own = with_trajectory(
        with_scheduler(pipeline, "predictor_corrector"),
        Trajectory((900, 400, 100), 1000, "epsilon", "by hand"),
    )
    assert probe(own, num_inference_steps=3).timesteps == (900, 400, 400, 100, 100)


def test_a_guided_pipeline_takes_it(dit: Any) -> None:
    own = with_scheduler(dit(DDPMScheduler()), "predictor_corrector")
    images = call_pipeline(
        own, generators=generators(0, 0, 2), num_inference_steps=3, inputs={"class_labels": 3}
    )
    assert np.isfinite(images).all() and len(images) == 2


@pytest.mark.parametrize(("name", "value"), [("snr", 0.0), ("snr", 2.0), ("corrector_steps", -1)])
def test_settings_are_checked(name: str, value: float) -> None:
    with pytest.raises(OctavoError, match=f"^{name}: "):
        PredictorCorrectorScheduler(**{name: value})

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline

from octavo.diffusion import call_pipeline, generators
from octavo.diffusion.solvers.continuous import continuous_schedule
from octavo.diffusion.solvers.inside_pipeline import Solving, solve_inside
from octavo.errors import OctavoError

TRAILING = {"timestep_spacing": "trailing", "clip_sample": False}


def ddim(scheduler: Any, steps: int) -> Any:
    """DDIM with eta = 0 as a solver, whose timesteps are those of "trailing"."""
    schedule = continuous_schedule(scheduler)
    timesteps = [int(t) for t in np.round(1000 - np.arange(steps) * (1000 / steps)) - 1]

    def solver(state: torch.Tensor, generator: torch.Generator) -> Solving:
        for i, t in enumerate(timesteps):
            prediction = yield float(t), state
            following = timesteps[i + 1] if i + 1 < steps else None
            state = schedule.discrete.jump(*schedule.split(prediction, state, float(t)), following)
        return state

    return solver


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddim_as_a_solver_makes_the_images_of_ddim(pipeline: Any, prediction_type: str) -> None:
    own = DDPMPipeline(pipeline.unet, DDIMScheduler(prediction_type=prediction_type, **TRAILING))
    expected = call_pipeline(own, generators=generators(3, 0, 2), num_inference_steps=5)
    solved = solve_inside(own, ddim(own.scheduler, 5), generators=generators(3, 0, 2))
    assert solved.images.dtype == np.float32 and solved.evaluations == (5, 5)
    assert np.abs(solved.images - expected).max() < 1e-3
    assert type(own.scheduler) is DDIMScheduler


def test_guidance_labels_and_decoding_are_the_pipelines(dit: Any) -> None:
    own = dit(DDIMScheduler(**TRAILING))
    inputs = {"class_labels": [3, 5, 8], "guidance_scale": 2.0}
    common = {"generators": generators(3, 1, 2), "inputs": inputs, "first_image": 1}
    expected = call_pipeline(own, num_inference_steps=4, **common)
    common["generators"] = generators(3, 1, 2)
    solved = solve_inside(own, ddim(own.scheduler, 4), **common)
    assert np.abs(solved.images - expected).max() < 1e-3 and solved.images.std() > 0.01


def test_the_network_is_told_real_timesteps(hills_pipeline: Any, normal: Any) -> None:
    own = hills_pipeline(DDIMScheduler(), normal)

    def solver(state: torch.Tensor, generator: torch.Generator) -> Solving:
        for t in (999.0, 500.25, 0.5):
            yield t, state
        return state

    assert solve_inside(own, solver, generators=generators(0, 0, 1)).evaluations == (3,)
    assert own.unet.asked == [999.0, 500.25, 0.5]


def test_what_takes_too_long_or_has_no_seed_is_told_in_one_line(hills_pipeline: Any, normal: Any) -> None:
    own = hills_pipeline(DDIMScheduler(), normal)
    with pytest.raises(OctavoError, match=r"max_evaluations: .* not ended after 3 evaluations"):
        solve_inside(own, ddim(own.scheduler, 5), generators=generators(0, 0, 1), max_evaluations=3)
    with pytest.raises(OctavoError, match="generators: there is none"):
        solve_inside(own, ddim(own.scheduler, 5), generators=[])


def test_the_schedule_between_timesteps() -> None:
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True)
    schedule = continuous_schedule(scheduler)
    for t in (0, 1, 500, 998):
        assert schedule.alpha_bar(float(t)) == pytest.approx(float(scheduler.alphas_cumprod[t]), rel=1e-9)
        assert schedule.timestep(schedule.log_sigma(t + 0.25)) == pytest.approx(t + 0.25)
    halfway = (schedule.log_sigma(500) + schedule.log_sigma(501)) / 2
    assert schedule.log_sigma(500.5) == pytest.approx(halfway)
    assert schedule.alpha_bar(999.0) == pytest.approx(1e-12, rel=1e-3) and schedule.discrete.clip is None

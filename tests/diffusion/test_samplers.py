from __future__ import annotations

import numpy as np
import pytest
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler

from octavo.diffusion import call_pipeline, generators
from octavo.diffusion.samplers import with_scheduler
from octavo.errors import OctavoError

# DPMSolver's and Euler's set_timesteps, with numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def images(pipeline, steps: int = 4) -> np.ndarray:  # type: ignore[no-untyped-def]
    return call_pipeline(pipeline, generators=generators(0, 0, 2), num_inference_steps=steps)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ddpm", DDPMScheduler),
        ("DDPMScheduler", DDPMScheduler),
        ("dpmsolver++", DPMSolverMultistepScheduler),
    ],
)
def test_a_ddim_pipeline_samples_with_any_other(pipeline, name: str, kind: type) -> None:  # type: ignore[no-untyped-def]
    before = images(pipeline)
    other = with_scheduler(pipeline, name)
    by_hand = DDPMPipeline(pipeline.unet, kind.from_config(pipeline.scheduler.config))
    assert type(other.scheduler) is kind and other.unet is pipeline.unet
    assert np.array_equal(images(other), images(by_hand))
    assert np.array_equal(images(pipeline), before) and not np.array_equal(images(other), before)


def test_ddim_stays_ddim_and_comes_back(pipeline) -> None:  # type: ignore[no-untyped-def]
    same = with_scheduler(pipeline, "ddim")
    assert type(same) is type(pipeline) and same.scheduler is not pipeline.scheduler
    back = with_scheduler(with_scheduler(pipeline, "ddpm"), "DDIM")
    assert type(back.scheduler) is DDIMScheduler
    for other in (same, back):
        assert np.array_equal(images(other), images(pipeline))


def test_a_conditional_pipeline_keeps_its_class(dit) -> None:  # type: ignore[no-untyped-def]
    own = dit(DDIMScheduler())
    other = with_scheduler(own, "dpmsolver++")
    assert type(other) is type(own) and type(own.scheduler) is DDIMScheduler
    assert type(other.scheduler) is DPMSolverMultistepScheduler


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("EulerDiscreteScheduler", "scales the network's input"),
        ("PNDMScheduler", "takes no generator"),
        ("FlowMatchEulerDiscreteScheduler", "does not fit DDIMScheduler"),
        ("UNet2DModel", "nor a scheduler"),
        ("euler", "nor a scheduler"),
    ],
)
def test_what_does_not_fit_is_refused(pipeline, name: str, told: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(OctavoError, match=told):
        with_scheduler(pipeline, name)

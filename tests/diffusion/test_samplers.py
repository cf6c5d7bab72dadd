from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from octavo.diffusion import call_pipeline, generators
from octavo.diffusion.samplers import SOLVERS, with_scheduler
from octavo.diffusion.trajectories import noise_schedule
from octavo.errors import OctavoError

# DPMSolver's and Euler's set_timesteps, with numpy 2
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]


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
        ("KDPM2AncestralDiscreteScheduler", "scales the network's input"),
        ("LMSDiscreteScheduler", "takes no generator"),
        ("DPMSolverSDEScheduler", "cannot be made here"),
        ("EDMEulerScheduler", "does not have the model's noise schedule"),
        ("FlowMatchEulerDiscreteScheduler", "does not fit DDIMScheduler"),
        ("UNet2DModel", "nor a scheduler"),
        ("eulerian", "nor a scheduler"),
    ],
)
def test_what_does_not_fit_is_refused(pipeline, name: str, told: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(OctavoError, match=told):
        with_scheduler(pipeline, name)


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_every_solver_is_on_the_models_own_noise_schedule(pipeline, dit, name: str) -> None:  # type: ignore[no-untyped-def]
    """Also where the model has its schedule by default, which diffusers leaves out; Heun's default is another."""
    for own in (DDIMScheduler(), DDIMScheduler(beta_schedule="scaled_linear", set_alpha_to_one=False)):
        for before in (DDPMPipeline(pipeline.unet, own), dit(own)):
            other = with_scheduler(before, name)
            assert torch.equal(other.scheduler.alphas_cumprod, own.alphas_cumprod)
            kind, settings = SOLVERS[name]
            unconditional = type(before) is DDPMPipeline
            assert type(other.scheduler).__name__ == kind or (
                unconditional
                and type(other.scheduler).__name__ == kind.replace("Scheduler", "UnconditionalScheduler")
            )
            assert {key: other.scheduler.config[key] for key in settings} == dict(settings)
            if hasattr(other.scheduler, "final_alpha_cumprod"):
                assert other.scheduler.final_alpha_cumprod == own.final_alpha_cumprod
            assert type(before.scheduler) is DDIMScheduler and before.scheduler is own


@pytest.mark.parametrize(
    "kind",
    [DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler],
)
@pytest.mark.parametrize("name", ["ddim", "ddpm", "predictor_corrector"])
def test_what_never_clipped_is_not_clipped_by_another_solver(dit, kind: type, name: str) -> None:  # type: ignore[no-untyped-def]
    """Latents reach 4; DDIM and DDPM clip to 1 unless told."""
    other = with_scheduler(dit(kind()), name).scheduler
    assert other.config.clip_sample is False and noise_schedule(other).clip is None


@pytest.mark.parametrize("name", ["unipc", "dpmsolver++", "deis", "euler", "predictor_corrector"])
def test_clipping_comes_back_with_a_solver_that_clips_and_no_other_is_said_to(pipeline, name: str) -> None:  # type: ignore[no-untyped-def]
    own = DDPMPipeline(pipeline.unet, DDIMScheduler(clip_sample_range=0.9))
    other = with_scheduler(own, name)
    assert noise_schedule(other.scheduler).clip is None and noise_schedule(own.scheduler).clip == 0.9
    for solver in ("ddim", "ddpm", "heun"):
        assert noise_schedule(with_scheduler(other, solver).scheduler).clip == 0.9


def test_a_name_is_read_in_either_spelling(pipeline) -> None:  # type: ignore[no-untyped-def]
    assert type(with_scheduler(pipeline, "Euler-Ancestral").scheduler) is type(
        with_scheduler(pipeline, "euler_ancestral").scheduler
    )


def test_what_a_solver_says_goes_before_the_models_own_settings(pipeline) -> None:  # type: ignore[no-untyped-def]
    noisy = with_scheduler(pipeline, "dpmsolver++sde")
    assert noisy.scheduler.config.algorithm_type == "sde-dpmsolver++"
    assert with_scheduler(noisy, "dpmsolver++").scheduler.config.algorithm_type == "dpmsolver++"


@pytest.mark.parametrize("name", ["pndm", "euler_ancestral"])
def test_a_solver_without_a_formula_for_the_prediction_is_refused(pipeline, name: str) -> None:  # type: ignore[no-untyped-def]
    own = DDPMPipeline(pipeline.unet, DDIMScheduler(prediction_type="sample"))
    with pytest.raises(OctavoError, match="no formula for a model that predicts the sample"):
        with_scheduler(own, name)


def test_a_noise_schedule_that_a_class_does_not_know_is_refused(pipeline) -> None:  # type: ignore[no-untyped-def]
    own = DDPMPipeline(pipeline.unet, DDIMScheduler(rescale_betas_zero_snr=True))
    with pytest.raises(OctavoError, match="DEISMultistepScheduler does not have the model's noise schedule"):
        with_scheduler(own, "deis")

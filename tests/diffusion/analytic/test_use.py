from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)

import octavo
from octavo.diffusion import call_pipeline, generators
from octavo.diffusion.analytic import AnalyticScheduler, Gamma, with_analytic_variance
from octavo.diffusion.analytic.scheduler import AnalyticTrajectoryScheduler
from octavo.diffusion.trajectories import Trajectory, noise_schedule, with_trajectory
from octavo.errors import OctavoError
from octavo.fingerprint import fingerprint, model_identity

GAMMA = Gamma((0, 500, 999), (0.5, 0.95, 1.0), (0.0,) * 3, 1000, "epsilon")


def test_the_network_and_the_noise_schedule_stay(unet: Any) -> None:
    pipeline = DDIMPipeline(unet, DDIMScheduler(beta_end=0.015, clip_sample_range=0.8))
    ours = with_analytic_variance(pipeline, GAMMA, "ddim", last_noise=2.0, largest_variance=0.5)
    assert type(ours) is DDPMPipeline and ours.unet is unet and type(pipeline.scheduler) is DDIMScheduler
    config = ours.scheduler.config
    assert type(ours.scheduler) is AnalyticScheduler and config.kind == "ddim"
    assert (config.beta_end, config.clip_sample_range) == (0.015, 0.8)
    assert (config.gamma_timesteps, config.gamma) == ([0, 500, 999], [0.5, 0.95, 1.0])
    assert (config.last_noise, config.largest_variance) == (2.0, 0.5)
    assert "set_alpha_to_one" not in config  # DDIM's alone, of which diffusers would warn
    images = call_pipeline(ours, generators=generators(0, 0, 2), num_inference_steps=3)
    assert np.isfinite(images).all() and np.abs(images[0] - images[1]).max() > 0.1


def test_another_gamma_takes_the_place_of_the_first(unet: Any) -> None:
    first = with_analytic_variance(DDPMPipeline(unet, DDPMScheduler()), GAMMA)
    second = with_analytic_variance(first, replace(GAMMA, values=(0.4, 0.9, 1.0)), "ddim")
    assert first.scheduler.config.gamma == [0.5, 0.95, 1.0] and first.scheduler.config.kind == "ddpm"
    assert second.scheduler.config.gamma == [0.4, 0.9, 1.0] and second.scheduler.config.kind == "ddim"


def test_a_trajectory_stays(unet: Any) -> None:
    bound = with_trajectory(
        DDIMPipeline(unet, DDIMScheduler()), Trajectory((900, 400, 20), 1000, "epsilon", "by hand")
    )
    ours = with_analytic_variance(bound, GAMMA)
    assert type(ours.scheduler) is AnalyticTrajectoryScheduler
    assert ours.scheduler.config.trajectory == [900, 400, 20]
    again = with_analytic_variance(ours, GAMMA, "ddim")
    assert again.scheduler.config.trajectory == [900, 400, 20] and again.scheduler.config.kind == "ddim"


def test_latents_have_no_8_bit_levels_and_guidance_goes_on(dit: Any) -> None:
    ours = with_analytic_variance(dit(DDIMScheduler()), GAMMA)
    assert type(ours) is DiTPipeline and ours.scheduler.config.last_noise is None
    both, second = (
        call_pipeline(
            ours,
            generators=generators(0, first, 2 - first),
            num_inference_steps=3,
            inputs={"class_labels": 1},
        )
        for first in (0, 1)
    )
    np.testing.assert_allclose(both[1], second[0], atol=1e-4)


def test_what_never_clipped_is_not_clipped_with_optimal_variances(dit: Any) -> None:
    ours = with_analytic_variance(dit(DPMSolverMultistepScheduler()), GAMMA).scheduler
    assert ours.config.clip_sample is False and noise_schedule(ours).clip is None
    bound = with_trajectory(dit(UniPCMultistepScheduler()), Trajectory((900, 20), 1000, "epsilon", "by hand"))
    assert noise_schedule(with_analytic_variance(bound, GAMMA).scheduler).clip is None


def test_a_gamma_of_another_network_is_refused(unet: Any) -> None:
    pipeline = DDPMPipeline(unet, DDPMScheduler())
    own = replace(GAMMA, model=model_identity(unet), network=fingerprint(unet))
    with_analytic_variance(pipeline, own)
    with pytest.raises(
        OctavoError, match="gamma: is of another model, not of this unet; estimate it on this"
    ):
        with_analytic_variance(pipeline, replace(own, model="0" * 32))
    with pytest.raises(OctavoError, match="gamma: is of this unet in other bits, or of other versions"):
        with_analytic_variance(pipeline, replace(own, network="0" * 32))
    with_analytic_variance(pipeline, replace(own, network=None))
    digest = noise_schedule(pipeline.scheduler).digest
    with_analytic_variance(pipeline, replace(own, alpha_bars=digest))
    with pytest.raises(
        OctavoError, match=r"gamma: is for another noise schedule .*; estimate it on this model"
    ):
        other_betas = DDPMPipeline(unet, DDPMScheduler(beta_end=0.03))
        with_analytic_variance(other_betas, replace(own, alpha_bars=digest))
    with pytest.raises(OctavoError, match="in other bits"):
        other = DDPMPipeline(unet, DDPMScheduler()).unet
        with_analytic_variance(pipeline, replace(own, network="0" * 32), networks={"unet": other})
    with pytest.raises(OctavoError, match="gamma: is for 1000 training timesteps, the scheduler has 12"):
        with_analytic_variance(DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=12)), GAMMA)
    with pytest.raises(OctavoError, match="prediction type 'epsilon', this one's is 'sample'"):
        with_analytic_variance(DDPMPipeline(unet, DDPMScheduler(prediction_type="sample")), GAMMA)
    with pytest.raises(OctavoError, match="kind: 'sde' is not one of ddpm, ddim"):
        with_analytic_variance(pipeline, GAMMA, "sde")


def test_a_pipeline_with_a_gamma_is_not_quantized(unet: Any) -> None:
    """It would keep the full-precision network's; the other order is refused above."""
    plain = DDPMPipeline(unet, DDPMScheduler())
    on_trajectory = with_trajectory(plain, Trajectory((900, 20), 1000, "epsilon", "by hand"))
    for pipeline in (with_analytic_variance(plain, GAMMA), with_analytic_variance(on_trajectory, GAMMA)):
        with pytest.raises(
            OctavoError, match=r"scheduler: its optimal variances .* quantize the model under another"
        ):
            octavo.quantize(pipeline, octavo.PTQ4DM(samples=2, steps=2), progress=False)

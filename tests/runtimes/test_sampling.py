"""What an export says of sampling is what the schedulers do."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from octavo.diffusion.analytic.scheduler import AnalyticScheduler
from octavo.diffusion.solvers.eta import DDIMEtaScheduler
from octavo.diffusion.trajectories.schedulers import DDIMEtaTrajectoryScheduler, DDIMTrajectoryScheduler
from octavo.errors import OctavoError
from octavo.runtimes.sampling import sampling_settings


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(),
        DDIMScheduler(steps_offset=1, set_alpha_to_one=False, clip_sample=False),
        DDIMScheduler(timestep_spacing="trailing", clip_sample_range=0.5),
        DDIMScheduler(timestep_spacing="linspace", clip_sample=False),
        DDIMTrajectoryScheduler(trajectory=[901, 400, 7], set_alpha_to_one=False),
        DDIMEtaScheduler(eta=0.5),
        DDIMEtaTrajectoryScheduler(trajectory=[901, 400, 7], eta=1.0),
    ],
    ids=lambda scheduler: f"{type(scheduler).__name__}-{scheduler.config.timestep_spacing}",
)
def test_ddim_by_these_numbers_is_the_scheduler_s(scheduler: DDIMScheduler) -> None:
    steps = len(scheduler.config.get("trajectory") or range(7))
    found = sampling_settings(scheduler, steps)
    scheduler.set_timesteps(steps)
    assert found["timesteps"] == scheduler.timesteps.tolist()
    abar = torch.tensor([*found["alphas_cumprod"], found["final_alpha_cumprod"]])
    clip = found["clip_sample_range"] or float("inf")
    generator = torch.Generator().manual_seed(0)
    for t, previous in zip(found["timesteps"], found["previous_timesteps"], strict=True):
        x, noise, added = torch.randn(3, 1, 3, 4, 4, generator=generator)
        now, then = abar[t], abar[previous]
        clean = ((x - (1 - now).sqrt() * noise) / now.sqrt()).clamp(-clip, clip)
        sigma = found.get("eta", 0.0) * ((1 - then) / (1 - now) * (1 - now / then)).sqrt()
        ours = then.sqrt() * clean + (1 - then - sigma**2).sqrt() * noise + sigma * added
        theirs = scheduler.step(noise, t, x, variance_noise=added).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_variances_of_optimal_ones_are_listed() -> None:
    scheduler = AnalyticScheduler(kind="ddim", gamma_timesteps=[0, 500, 999], gamma=[0.1, 0.5, 0.9])
    found = sampling_settings(scheduler, 5)
    scheduler.set_timesteps(5)
    assert found["variances"] == scheduler.variances().tolist() and found["kind"] == "ddim"
    assert found["variances"][0] > 0 == found["variances"][-1]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_what_such_numbers_do_not_describe_is_left_out() -> None:
    assert list(sampling_settings(FlowMatchEulerDiscreteScheduler(), 5)) == ["prediction_type"]
    fractional = sampling_settings(EulerDiscreteScheduler(timestep_spacing="linspace"), 7)
    assert "timesteps" not in fractional and len(fractional["alphas_cumprod"]) == 1000
    twice = sampling_settings(HeunDiscreteScheduler(timestep_spacing="leading"), 4)["timesteps"]
    assert twice == sorted(set(twice), reverse=True)
    unclipped = UniPCMultistepScheduler.from_config(DDIMScheduler(clip_sample=True).config)
    assert unclipped.config.clip_sample and sampling_settings(unclipped, 4)["clip_sample_range"] is None
    with pytest.raises(OctavoError, match="steps: 2000 cannot be set"):
        sampling_settings(DDIMScheduler(), 2000)


def test_the_scheduler_stays_as_it_was() -> None:
    scheduler = DDPMScheduler()
    before = scheduler.timesteps.clone()
    sampling_settings(scheduler, 3)
    assert torch.equal(scheduler.timesteps, before) and scheduler.num_inference_steps is None

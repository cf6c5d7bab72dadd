from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from octavo.diffusion import call_pipeline, generators
from octavo.errors import OctavoError
from octavo.study import Sampler
from octavo.study.samplers import with_sampler


def images(pipeline, steps: int) -> torch.Tensor:  # type: ignore[no-untyped-def]
    return call_pipeline(
        pipeline, generators=generators(0, 0, 2), num_inference_steps=steps, output_type="pt"
    )


def test_ddim_and_ddpm_are_diffusers_own(pipeline) -> None:  # type: ignore[no-untyped-def]
    ddim, ddpm = with_sampler(pipeline, Sampler("ddim", 3)), with_sampler(pipeline, Sampler("ddpm", 3))
    expected = DDIMPipeline(pipeline.unet, DDIMScheduler.from_config(pipeline.scheduler.config))
    assert torch.equal(images(ddim, 3), images(expected, 3))
    expected = DDPMPipeline(pipeline.unet, DDPMScheduler.from_config(pipeline.scheduler.config))
    assert torch.equal(images(ddpm, 3), images(expected, 3))
    assert not torch.equal(images(ddim, 3), images(ddpm, 3))
    assert ddim.unet is pipeline.unet and ddim.scheduler is not pipeline.scheduler


def test_its_own_sampler_is_kept_but_not_shared(pipeline) -> None:  # type: ignore[no-untyped-def]
    own = with_sampler(pipeline, Sampler("own", 3))
    assert type(own.scheduler) is type(pipeline.scheduler) and own.scheduler is not pipeline.scheduler
    assert own.unet is pipeline.unet


def test_what_does_not_fit_is_told(pipeline) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(OctavoError, match="DDIM-1001 has more steps than the 1000"):
        with_sampler(pipeline, Sampler("ddim", 1001))
    flow = with_sampler(pipeline, Sampler("own", 2))
    flow.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(OctavoError, match="does not fit"):
        with_sampler(flow, Sampler("ddim", 10))
    with pytest.raises(OctavoError, match="ddim, ddpm, own"):
        Sampler("euler", 10)  # type: ignore[arg-type]
    with pytest.raises(OctavoError, match="steps: 0"):
        Sampler("ddim", 0)

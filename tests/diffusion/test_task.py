from __future__ import annotations

from typing import Any

import diffusers
import pytest
from diffusers import DDIMScheduler, DDPMScheduler

from octavo.diffusion.task import control_name, needed_pictures, task_of


@pytest.mark.parametrize(
    ("name", "task", "pictures"),
    [
        ("StableDiffusionPipeline", "text-to-image", ()),
        ("StableDiffusionXLPipeline", "text-to-image", ()),
        ("StableDiffusion3Pipeline", "text-to-image", ()),
        ("FluxPipeline", "text-to-image", ()),
        ("PixArtAlphaPipeline", "text-to-image", ()),
        ("StableDiffusionControlNetPipeline", "text-to-image with ControlNet", ("image",)),
        ("StableDiffusionImg2ImgPipeline", "image-to-image", ("image",)),
        (
            "StableDiffusionControlNetImg2ImgPipeline",
            "image-to-image with ControlNet",
            ("image", "control_image"),
        ),
        ("StableDiffusionInstructPix2PixPipeline", "image-to-image", ()),
        ("StableDiffusionInpaintPipeline", "inpainting", ("image", "mask_image")),
        ("StableDiffusionXLInpaintPipeline", "inpainting", ("image", "mask_image")),
        ("FluxControlNetPipeline", "text-to-image with ControlNet", ("control_image",)),
        ("StableVideoDiffusionPipeline", "video", ()),
        ("DDIMPipeline", "unconditional", ()),
    ],
)
def test_the_call_tells_the_task(name: str, task: str, pictures: tuple[str, ...]) -> None:
    pipeline: Any = object.__new__(getattr(diffusers, name))
    assert task_of(pipeline) == task
    assert needed_pictures(pipeline) == pictures


def test_classes_are_a_task_only_for_a_network_that_embeds_them(dit: Any, ddpm: Any) -> None:
    assert task_of(dit(DDIMScheduler())) == "class-conditional"
    assert task_of(ddpm(DDPMScheduler())) == "unconditional"
    unconditional = diffusers.ConsistencyModelPipeline(
        ddpm(DDPMScheduler()).unet, diffusers.CMStochasticIterativeScheduler()
    )
    assert task_of(unconditional) == "unconditional"


def test_what_steers_a_controlnet() -> None:
    pipeline: Any = object.__new__(diffusers.StableDiffusionControlNetPipeline)
    assert control_name(pipeline) == "image"
    assert control_name(object.__new__(diffusers.FluxControlNetPipeline)) == "control_image"

"""An input's name tells whether its list is one entry for each image or describes the whole call."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from PIL import Image
from tiny_families import build, picture

from octavo.diffusion import call_pipeline, first_call, generators, inputs_of_images
from octavo.errors import OctavoError

A, B, C, D = (picture(seed) for seed in range(4))


def test_what_is_one_for_each_image() -> None:
    embeds = torch.arange(6).reshape(3, 2)
    inputs = {
        "class_labels": 4,
        "prompt": ["a", "b", "c"],
        "prompt_2": "d",
        "negative_prompt": "ugly",
        "image": A,
        "mask_image": [A, B],
    }
    tensors = {"prompt_embeds": embeds, "negative_pooled_prompt_embeds": embeds, "latents": embeds}
    chosen = inputs_of_images({**inputs, **tensors}, [2, 3])
    for name in tensors:
        assert torch.equal(chosen.pop(name), embeds[[2, 0]])
    assert chosen == {
        "class_labels": [4, 4],
        "prompt": ["c", "a"],
        "prompt_2": ["d", "d"],
        "negative_prompt": ["ugly", "ugly"],
        "image": [A, A],
        "mask_image": [A, B],
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guidance_scale", 3.0),
        ("timesteps", [3, 2]),
        ("sigmas", [3.0, 2.0]),
        ("skip_guidance_layers", [0, 1]),
        ("ip_adapter_image", A),
        ("ip_adapter_image", [A]),
        ("ip_adapter_image_embeds", [torch.zeros(2, 1, 4)]),
        ("controlnet_conditioning_scale", [0.5, 1.0]),
        ("control_guidance_start", [0.0, 0.5]),
        ("control_mode", [0, 1]),
        ("video", [A, B]),
        ("callback_on_step_end_tensor_inputs", ["latents"]),
        ("level", torch.tensor(5)),
    ],
)
def test_what_describes_the_whole_call(name: str, value: Any) -> None:
    assert inputs_of_images({name: value}, [1, 2, 3])[name] is value


def test_one_picture_as_an_array_is_for_every_image() -> None:
    one, several = torch.zeros(3, 8, 8), np.zeros((2, 8, 8, 3))
    assert [each is one for each in inputs_of_images({"image": one}, [4, 5])["image"]] == [True, True]
    assert inputs_of_images({"image": several}, [0, 1, 2])["image"].shape == (3, 8, 8, 3)


def test_sizes_from_json_reach_sdxl_as_tuples() -> None:
    pipeline, inputs = build("sdxl")
    sizes = {"original_size": [100, 200], "crops_coords_top_left": [3, 4], "target_size": [16, 16]}
    _, kwargs = first_call(pipeline, batch_size=3, num_inference_steps=2, inputs={**inputs, **sizes})
    assert kwargs["added_cond_kwargs"]["time_ids"][-3:].tolist() == [[100, 200, 3, 4, 16, 16]] * 3


@pytest.mark.parametrize("count", [1, 3])
def test_layers_that_sd3_skips(count: int) -> None:
    pipeline, inputs = build("sd3")
    skipped: list[Any] = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: skipped.append(kwargs.get("skip_layers")), with_kwargs=True
    )
    skip = {
        "skip_guidance_layers": [0, 1],
        "skip_layer_guidance_start": 0.0,
        "skip_layer_guidance_stop": 1.0,
    }
    call_pipeline(
        pipeline,
        generators=generators(0, 0, count),
        num_inference_steps=3,
        inputs={**inputs, **skip},
        output_type="latent",
    )
    assert [layers for layers in skipped if layers is not None]
    assert all(layers == [0, 1] for layers in skipped if layers is not None)


def two_controlnets() -> Any:
    first, second = (build("controlnet")[0] for _ in range(2))
    nets = MultiControlNetModel([first.controlnet, second.controlnet])
    pipeline = StableDiffusionControlNetPipeline(
        **{**first.components, "controlnet": nets}, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _mean(image: Image.Image) -> float:
    return float(np.asarray(image).mean() / 255)


@pytest.mark.parametrize(
    ("first_image", "pictures", "expected"),
    [
        (0, [A, B], [[A, A], [B, B]]),
        (1, [A, B], [[A, A], [B, B]]),
        (1, [[A, B], [C, D]], [[C, A], [D, B]]),
    ],
)
def test_each_of_two_controlnets_reads_its_own_pictures(
    first_image: int, pictures: Any, expected: Any
) -> None:
    pipeline = two_controlnets()
    seen: list[list[float]] = []
    for net in pipeline.controlnet.nets:
        net.controlnet_cond_embedding.register_forward_pre_hook(
            lambda module, args: seen.append(args[0].mean((1, 2, 3)).tolist())
        )
    inputs = {
        "prompt": "a cat",
        "image": pictures,
        "guidance_scale": 1.0,
        "controlnet_conditioning_scale": [0.5, 1.0],
    }
    call_pipeline(
        pipeline,
        generators=generators(0, first_image, 2),
        num_inference_steps=1,
        inputs=inputs,
        output_type="latent",
        first_image=first_image,
    )
    for found, own in zip(seen[:2], expected, strict=True):
        assert found == pytest.approx([_mean(image) for image in own], abs=1e-4)


@pytest.mark.parametrize("pictures", [A, [A], [A, B, C], [[A], [B]]])
def test_pictures_that_are_not_as_many_as_the_controlnets(pictures: Any) -> None:
    with pytest.raises(
        OctavoError, match=r"image \(--control-image\): StableDiffusionControlNetPipeline holds 2 networks"
    ):
        inputs_of_images({"image": pictures}, [0, 1], two_controlnets())

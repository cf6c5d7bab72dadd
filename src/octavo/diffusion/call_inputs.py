"""Which arguments of a pipeline's call are one for each image and which describe the whole call, by what they mean."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from octavo.diffusion.task import control_name
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PER_IMAGE = re.compile(
    r"((negative|source|target|task|content)_)?prompt(_\d)?"
    r"|(negative_)?(pooled_)?prompt_embeds(_pooled|_mask|_qwen|_clip|_t5)?(_\d)?"
    r"|(negative_)?prompt_attention_mask(_\d)?|(negative_)?image_embeds"
    r"|class_labels|image|mask_image|control_image|((masked_)?image_|video_|audio_)?latents|initial_audio_waveforms"
)
"""Arguments of diffusers' pipelines that hold one entry for each image. Every other list describes the whole call:
`timesteps`, `skip_guidance_layers`, `ip_adapter_image` (one for each adapter), a video's frames."""
PICTURES = {"image": 4, "control_image": 4, "mask_image": 3}
"""Pictures -> the axes that several have as an array; fewer are one picture's."""
SIZES = re.compile(
    r"(negative_)?(original_size|target_size|crops_coords_top_left)|micro_conditioning_crop_coord"
)
"""Sizes and places (y, x): pipelines add these tuples up, and JSON has lists alone."""
READ_REFERENCES = re.compile(r"Flux2.*|QwenImageEditPlus.*")
"""Pipelines whose `image` holds pictures that every image is to follow, not one to start from."""


def inputs_of_images(
    inputs: Mapping[str, Any], images: Sequence[int], pipeline: DiffusionPipeline | None = None
) -> dict[str, Any]:
    """The `inputs` of a whole run narrowed to some of its images, by the rules of `call_pipeline`.

    `pipeline`: what it is that they are for; of several ControlNets or T2I adapters it tells which pictures go to each
    of them, whatever the image. Raises OctavoError for an empty list, and for pictures that are not as many as the
    networks that read them.

    >>> inputs_of_images({"class_labels": [3, 5], "prompt": "a cat", "skip_guidance_layers": [7, 8]}, range(1, 4))
    {'class_labels': [5, 3, 5], 'prompt': ['a cat', 'a cat', 'a cat'], 'skip_guidance_layers': [7, 8]}
    """
    by_network = _by_network(pipeline, inputs)
    return {
        name: _of_networks(value, images) if name == by_network else _of_images(name, value, images)
        for name, value in inputs.items()
    }


def _by_network(pipeline: DiffusionPipeline | None, inputs: Mapping[str, Any]) -> str | None:
    """The name of the input whose pictures are one for each network that reads them, or each mode of one."""
    if pipeline is None:
        return None
    if READ_REFERENCES.fullmatch(type(pipeline).__name__):
        return "image"
    control, adapter = (getattr(pipeline, name, None) for name in ("controlnet", "adapter"))
    if "ControlNetUnion" in type(control).__name__:
        return control_name(pipeline)
    for networks, name in (
        (getattr(control, "nets", None), control_name(pipeline)),
        (getattr(adapter, "adapters", None), "image"),
    ):
        if networks is None:
            continue
        value: Any = inputs.get(name)
        of_one = value if not _is_nested(value) else value[0]
        if (
            value is not None
            and len(networks) > 1
            and not (isinstance(of_one, list) and len(of_one) == len(networks))
        ):
            flag = " (--control-image)" if control is not None else ""
            raise OctavoError(
                f"inputs: {name}{flag}: {type(pipeline).__name__} holds {len(networks)} networks that read pictures; "
                "give a list of one for each, in their order"
            )
        return name
    return None


def _of_networks(value: Any, images: Sequence[int]) -> Any:
    """Pictures for each network, the same for every image; or, in a list of such lists, those of each image."""
    return [value[k % len(value)] for k in images] if _is_nested(value) else value


def _is_nested(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, list) for each in value)


def _of_images(name: str, value: Any, images: Sequence[int]) -> Any:
    if SIZES.fullmatch(name) and isinstance(value, list):
        return tuple(value)
    if not PER_IMAGE.fullmatch(name):
        return value
    array = torch.is_tensor(value) or isinstance(value, np.ndarray)
    if isinstance(value, (str, int, Image.Image)) or (array and value.ndim < PICTURES.get(name, 0)):
        return [value] * len(images)
    if isinstance(value, list) or (array and value.ndim > 0):
        if len(value) == 0:
            raise OctavoError(f"inputs: {name} is empty")
        chosen = [k % len(value) for k in images]
        return value[chosen] if array else [value[k] for k in chosen]
    return value

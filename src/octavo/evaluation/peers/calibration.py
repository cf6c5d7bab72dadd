"""What peers calibrate on: calls that the sampler makes of other images than the one call that is timed and judged."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from octavo.diffusion import call_pipeline, find_denoiser, generators
from octavo.diffusion.pairs import map_leaves

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SEED = 1_000_000
"""Of the first of these images: `first_call`, which is judged, starts from seed 0."""


def calibration_calls(
    pipeline: DiffusionPipeline,
    *,
    images: int,
    batch_size: int,
    steps: int,
    inputs: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Every call of the denoiser, each argument by name, while at least `images` images are sampled in `steps` steps.

    A call denoises `batch_size` images, as the call does that is timed. Tensors are copies.
    """
    denoiser = find_denoiser(pipeline)[1]
    signature = inspect.signature(type(denoiser).forward)
    calls: list[dict[str, Any]] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = dict(signature.bind(module, *args, **kwargs).arguments)
        arguments.pop("self")
        calls.append(map_leaves(arguments, lambda _, leaf: leaf.clone() if torch.is_tensor(leaf) else leaf))

    handle = denoiser.register_forward_pre_hook(look, with_kwargs=True)
    try:
        for start in range(0, images, batch_size):
            call_pipeline(
                pipeline,
                generators=generators(SEED, start, batch_size),
                num_inference_steps=steps,
                inputs=inputs,
                output_type="pt",
                first_image=start,
            )
    finally:
        handle.remove()
    return calls

"""Components besides the denoiser (a VAE's decoder) executed in integers, where they are quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from octavo.calibration.components import quantized_parts, with_part
from octavo.diffusion import first_part_call

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def with_executed_parts(
    pipeline: DiffusionPipeline,
    execute: Callable[[nn.Module, dict[str, Any]], nn.Module],
    *,
    batch_size: int,
    inputs: Mapping[str, Any] | None,
) -> DiffusionPipeline:
    """The pipeline whose quantized parts are `execute(part, the keyword arguments of its call for batch_size images)`.

    To learn that call the pipeline is run with one evaluation of its denoiser; nothing is decoded.
    """
    for component, part in list(quantized_parts(pipeline)):
        kwargs = first_part_call(pipeline, part, batch_size=batch_size, inputs=inputs)
        pipeline = with_part(pipeline, component, execute(part, kwargs))
    return pipeline

"""The task that a model was quantized for: recorded, and one line where it is used for another."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from octavo.checkpoint.quantizer import quantizer_of
from octavo.diffusion import find_denoiser
from octavo.diffusion.task import task_of
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

logger = logging.getLogger(__name__)

TASK = "task"
"""Where the configuration's `calibration` tells it."""


def recorded_task(denoiser: nn.Module) -> str | None:
    """The task that Octavo calibrated `denoiser` for; None if it did not, or in a version that did not record it."""
    quantizer = quantizer_of(denoiser)
    task = None if quantizer is None else quantizer.quantization_config.calibration.get(TASK)
    return task if isinstance(task, str) else None


def warn_of_another_task(pipeline: DiffusionPipeline, taken: str) -> None:
    """Log one line if the component `taken` is the pipeline's denoiser and was calibrated for another task.

    For a pipeline that has just taken it: built, loaded, made from another, assigned to or accelerated. Ranges are
    those of what the network read while calibrating: an image-to-image run starts from other inputs.
    """
    try:
        component, denoiser = find_denoiser(pipeline)
    except OctavoError:
        return
    recorded = recorded_task(denoiser) if component == taken else None
    if recorded is not None and recorded != (own := task_of(pipeline)):
        logger.warning(
            "%s: its %s was calibrated for %s, not for %s; images may be worse than they need to: quantize the "
            "full-precision model in this pipeline",
            type(pipeline).__name__,
            component,
            recorded,
            own,
        )

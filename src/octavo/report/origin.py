"""Where a quantized model comes from: its recipe, where calibration looked, and how it is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from octavo.calibration.collect import DRAW_STREAM
from octavo.checkpoint.quantizer import quantizer_of
from octavo.diffusion import draw_labelled, probe
from octavo.diffusion.samplers import with_scheduler
from octavo.diffusion.timesteps import from_dict
from octavo.diffusion.trajectories import steps_of
from octavo.errors import OctavoError
from octavo.report.data import CalibrationSteps, Row

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LOADING = """import octavo  # registers the quantization method with diffusers
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("{folder}")
pipeline = octavo.accelerate(pipeline)  # real int8 on the CPU, by OpenVINO
"""


def recipe_of(denoiser: nn.Module) -> tuple[Row, Row]:
    """The recipe and the calibration's facts that a quantized network carries; empty where it carries none."""
    quantizer = quantizer_of(denoiser)
    if quantizer is None:
        return {}, {}
    config = quantizer.quantization_config
    return dict(config.recipe), dict(config.calibration)


def calibration_steps(
    pipeline: DiffusionPipeline, recipe: Row, how: Row, inputs: Mapping[str, Any] | None = None
) -> CalibrationSteps | None:
    """The draw of the calibration repeated: same distribution, count and seed. None where the recipe lacks one."""
    try:
        chosen, samples, steps = from_dict(recipe["timesteps"]), int(recipe["samples"]), int(recipe["steps"])
        seed = int(how["seed"])
        if steps_of(pipeline, steps) != steps:  # on a trajectory since: go by what it was calibrated on
            pipeline = with_scheduler(pipeline, how["scheduler"])
    except (KeyError, TypeError, ValueError, OctavoError):
        return None
    found = probe(pipeline, num_inference_steps=steps, inputs=inputs)
    generator = torch.Generator().manual_seed(seed + DRAW_STREAM)
    drawn = Counter(draw_labelled(chosen, samples, found.num_steps, generator).captured.tolist())
    return CalibrationSteps(
        distribution=chosen.to_dict(),
        pairs=[drawn.get(found.num_steps - step, 0) for step in range(found.num_steps)],
        timesteps=list(found.timesteps),
    )


def loading_code(pipeline_class: str, folder: str, made_by: str = "") -> str:
    """The lines that load the model, under the command that makes its folder where it is still to be made.

    >>> print(loading_code("DDIMPipeline", "digits-int8").splitlines()[-1])
    pipeline = octavo.accelerate(pipeline)  # real int8 on the CPU, by OpenVINO
    """
    lines = LOADING.format(pipeline=pipeline_class, folder=folder.replace("\\", "/").replace('"', ""))
    return f"# make it first: {made_by}\n\n{lines}" if made_by else lines

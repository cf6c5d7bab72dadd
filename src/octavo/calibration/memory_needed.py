"""What a calibration takes besides the weights it reads, told before it is begun where the machine has less."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import nn

from octavo.calibration.recipe import PTQ4DM
from octavo.calibration.rules import LayerRule
from octavo.calibration.second_order import MOMENT_BYTES
from octavo.memory import available
from octavo.quantization import walk
from octavo.quantization.moments import moment_bytes, moment_shape

logger = logging.getLogger(__name__)


def bytes_needed(denoiser: nn.Module, recipe: PTQ4DM, rules: Mapping[str, LayerRule]) -> int:
    """About how many bytes quantizing `denoiser` takes, its float weights and its activations left out.

    A byte for each integer weight; with second-order rounding the moments held at a time, and for the largest of them
    what rounding works on: two matrices in float64. Of Stable Diffusion 1.5 by `best` it says 2.1 GiB, where 2.9 were
    measured with the libraries and all else.
    """
    layers = [layer for name, layer in walk(denoiser) if name in rules]
    integers = sum(layer.weight.numel() for layer in layers)
    if recipe.rounding == "nearest" or not layers:
        return integers
    of_layers = [(layer.weight, getattr(layer, "groups", 1)) for layer in layers]
    moments = sum(moment_bytes(weight, groups) for weight, groups in of_layers)
    widest = max(moment_shape(weight, groups)[1] for weight, groups in of_layers)
    return integers + min(MOMENT_BYTES, moments) + 2 * 8 * widest**2


def tell_if_short(denoiser: nn.Module, recipe: PTQ4DM, rules: Mapping[str, LayerRule]) -> None:
    """Warn in one line if that is more than the system says it has: it would end the process without a word."""
    needed, there = bytes_needed(denoiser, recipe, rules), available()
    if there is not None and needed > there:
        mend = "close other programs" + (", or use --recipe ptq4dm" if recipe.rounding != "nearest" else "")
        logger.warning(
            "memory: quantizing takes about %.1f GiB besides the weights, and %.1f GiB are available; %s",
            needed / 2**30,
            there / 2**30,
            mend,
        )

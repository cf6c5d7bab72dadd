"""What a first conversion takes, told before it is begun where the machine has less."""

from __future__ import annotations

import logging
from collections.abc import Collection

from torch import nn

from octavo.memory import available
from octavo.quantization import quantized_layers

logger = logging.getLogger(__name__)
COPIES = 4
"""Bytes for each 8-bit weight while its graph is made, written, read and compiled; each further kernel takes as many.

Of Stable Diffusion 1.5 (860 M) 4.3 GiB were measured with one kernel a layer and 8.7 with two, libraries included.
"""


def conversion_bytes(denoiser: nn.Module, split: Collection[str] = ()) -> int:
    """About how many bytes converting `denoiser` for OpenVINO takes; `split`: the layers that get two kernels."""
    return sum(
        COPIES * layer.weight_int8.numel() * (2 if name in split else 1)
        for name, layer in quantized_layers(denoiser)
    )


def tell_if_short(denoiser: nn.Module, split: Collection[str]) -> None:
    """Warn in one line if that is more than the system says it has: it would end the process without a word."""
    needed, there = conversion_bytes(denoiser, split), available()
    if there is not None and needed > there:
        mend = "close other programs" + (
            ", or quantize with --pair-limit, which halves it here" if split else ""
        )
        logger.warning(
            "memory: converting the network takes about %.1f GiB, and %.1f GiB are available; %s",
            needed / 2**30,
            there / 2**30,
            mend,
        )

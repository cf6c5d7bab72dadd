"""From float weights to integer weights. The place for rounding better than to nearest."""

from __future__ import annotations

from typing import Protocol

import torch

from octavo.errors import OctavoError
from octavo.quantization.affine import quantize
from octavo.quantization.ranges import search_values
from octavo.quantization.specs import QParams, QuantSpec


class Rounding(Protocol):
    """Scales and integers of a weight: `[C, ...]` float => int8 of the same shape, parameters `[C]`."""

    def __call__(
        self, weight: torch.Tensor, spec: QuantSpec, metric: str = "mse"
    ) -> tuple[torch.Tensor, QParams]: ...


def round_nearest(weight: torch.Tensor, spec: QuantSpec, metric: str = "mse") -> tuple[torch.Tensor, QParams]:
    """Each output channel's scale by range search, then each weight to the nearest integer (PTQ4DM 3.1).

    `weight`: float `[C, ...]`, not changed. Returns int8 of the same shape and parameters of shape `[C]`.
    Raises `OctavoError` unless `spec` is symmetric per channel, and on an unknown metric or non-finite
    weights.

    >>> weight = torch.tensor([[0.5, -1.27], [0.0, 0.0]])
    >>> integers, qparams = round_nearest(weight, QuantSpec(granularity="per_channel", narrow=True), "minmax")
    >>> integers
    tensor([[  50, -127],
            [   0,    0]], dtype=torch.int8)
    """
    if not spec.symmetric or spec.granularity != "per_channel":
        raise OctavoError("weights: the integer kernels take symmetric per_channel weights only")
    weight = weight.detach().float()
    qparams = search_values(weight, spec, metric)
    return quantize(weight, qparams, spec), qparams


ROUNDING: dict[str, Rounding] = {"nearest": round_nearest}
"""Every rounding by the name a recipe uses."""


def round_weight(
    weight: torch.Tensor, spec: QuantSpec, metric: str = "mse", rounding: str = "nearest"
) -> tuple[torch.Tensor, QParams]:
    """`ROUNDING[rounding](weight, spec, metric)`; raises `OctavoError` when there is no such rounding.

    >>> round_weight(torch.ones(1, 2), QuantSpec(granularity="per_channel"), rounding="nearest")[0]
    tensor([[127, 127]], dtype=torch.int8)
    """
    if rounding not in ROUNDING:
        raise OctavoError(f"rounding: {rounding!r} is not one of {', '.join(ROUNDING)}")
    return ROUNDING[rounding](weight, spec, metric)

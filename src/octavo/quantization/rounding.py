"""From float weights to integer weights: scales by range search, then each weight to the nearest integer."""

from __future__ import annotations

import torch

from octavo.errors import OctavoError
from octavo.quantization.affine import quantize
from octavo.quantization.ranges import search_values
from octavo.quantization.specs import QParams, QuantSpec

ROUNDINGS = ("nearest", "gptq")
"""By the names a recipe uses. "gptq" starts from "nearest" and rounds again by what layers read (`gptq`)."""


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

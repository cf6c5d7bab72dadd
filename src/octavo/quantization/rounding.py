"""From float weights to integer weights: scales by range search, then each weight to the nearest integer."""

from __future__ import annotations

import torch

from octavo.errors import OctavoError
from octavo.quantization.groups import column_scale, multiply, search_groups, to_nearest
from octavo.quantization.pairs import partners, to_nearest_pairs, widened
from octavo.quantization.ranges import search_values
from octavo.quantization.specs import QParams, QuantSpec

ROUNDINGS = ("nearest", "gptq")
"""By the names a recipe uses. "gptq" starts from "nearest" and rounds again by what layers read (`gptq`)."""


def round_nearest(weight: torch.Tensor, spec: QuantSpec, metric: str = "mse") -> tuple[torch.Tensor, QParams]:
    """Each output channel's scale by range search, then each weight to the nearest integer (PTQ4DM 3.1).

    `weight`: float `[C, ...]`, not changed. Returns the integers that execute, int8 of the same shape, and parameters
    of shape `[C]`: integers times scale are near the weight. Per group the scales are those of `search_groups`, and
    the integers those of the spec's few bits times their group's multiplier. With a pair limit, both are the nearest
    within it (`octavo.quantization.pairs`). Raises `OctavoError` unless `spec` is
    symmetric and per channel or per group, and on an unknown metric or non-finite weights.

    >>> weight = torch.tensor([[0.5, -1.27], [0.0, 0.0]])
    >>> integers, qparams = round_nearest(weight, QuantSpec(granularity="per_channel", narrow=True), "minmax")
    >>> integers
    tensor([[  50, -127],
            [   0,    0]], dtype=torch.int8)
    """
    if not spec.symmetric or spec.granularity == "per_tensor":
        raise OctavoError("weights: the integer kernels take symmetric per_channel or per_group weights only")
    weight = weight.detach().float()
    qparams = (search_groups if spec.group_size else search_values)(weight, spec, metric)
    rows = weight.flatten(1)
    partner = partners(weight.shape) if spec.pair_limit else None
    if partner is not None:
        qparams = widened(rows, qparams, partner, spec)
        integers = to_nearest_pairs(rows, qparams.scale[:, None], partner, spec).to(torch.int8)
        return integers.view(weight.shape), qparams
    integers = to_nearest(rows, column_scale(qparams, rows.shape[1], spec), spec).to(torch.int8)
    return multiply(integers, qparams.multiplier, spec).view(weight.shape), qparams

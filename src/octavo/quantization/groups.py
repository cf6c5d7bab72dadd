"""Groups of a weight's columns: a scale for each, that is a whole multiple of its output channel's scale.

    w[c, k] ~ s[c] m[c, g] q[c, k]        k in group g, m a whole number from 1, q of at most 4 bits

A group is `group_size` consecutive columns of the weight as `[C, K]`: of a convolution, whose K is input channels x
kernel, the taps of neighbouring input channels. The last group may be shorter. What executes is the int8 number m q
with one scale per output channel, so an integer kernel that knows of no groups runs it exactly.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from octavo.errors import OctavoError
from octavo.quantization.affine import SMALLEST_SCALE
from octavo.quantization.metrics import METRICS, Distance, lp
from octavo.quantization.ranges import BLOCK, CANDIDATES, NOISE, search_values
from octavo.quantization.specs import QParams, QuantSpec

LARGEST = 63
"""The search keeps |m q| within this: kernels that add pairs of products in 16 bits stay exact (255 * 63 * 2 < 2^15).

At 4 bits m is then at most 9. With 18, which int8 allows, the mean square error of 13 of the bundled model's weights
would be 1.4, 2.8 and 5.8 % lower (groups of 128, 64 and 32; docs/log.md).
"""


def most_multiplier(spec: QuantSpec, largest: int = 127) -> int:
    """The largest m whose product with every integer of `spec` stays within `largest`.

    >>> spec = QuantSpec(4, granularity="per_group", narrow=True, group_size=32)
    >>> most_multiplier(spec), most_multiplier(spec, LARGEST)
    (18, 9)
    """
    return largest // -spec.qmin


def groups_shape(shape: torch.Size, group_size: int) -> tuple[int, int]:
    """The multipliers' shape, `[C, groups]`, of a weight's, `[C, ...]`."""
    return shape[0], -(-shape[1:].numel() // group_size)


def check_multipliers(name: str, multiplier: torch.Tensor | None, shape: torch.Size, spec: QuantSpec) -> None:
    """Raise `OctavoError` unless these are multipliers of a weight of `shape`: none, if `spec` has no groups.

    Each is a whole number from 1 whose product with every integer of `spec` is an int8 number.
    """
    if (multiplier is None) != (spec.group_size is None):
        raise OctavoError(f"{name}: give multipliers for weights per_group, and for those alone")
    if multiplier is None or spec.group_size is None:
        return
    wanted, most = groups_shape(shape, spec.group_size), most_multiplier(spec)
    if multiplier.shape != wanted or int(multiplier.min()) < 1 or int(multiplier.max()) > most:
        raise OctavoError(
            f"{name}: the multipliers of groups are not {list(wanted)} numbers from 1 to {most}"
        )


def per_column(multiplier: torch.Tensor, columns: int, spec: QuantSpec) -> torch.Tensor:
    """uint8 `[C, groups]` => `[C, columns]`: each column's multiplier.

    >>> spec = QuantSpec(4, granularity="per_group", group_size=2)
    >>> per_column(torch.tensor([[1, 3]], dtype=torch.uint8), 3, spec)
    tensor([[1, 1, 3]], dtype=torch.uint8)
    """
    assert spec.group_size is not None
    return multiplier[:, torch.arange(columns, device=multiplier.device) // spec.group_size]


def multiply(integers: torch.Tensor, multiplier: torch.Tensor | None, spec: QuantSpec) -> torch.Tensor:
    """The integers that execute, m q: int8 `[C, ...]`, the shape of `integers`; q itself without multipliers.

    >>> spec = QuantSpec(4, granularity="per_group", group_size=2)
    >>> multiply(torch.tensor([[7, -1, 2]], dtype=torch.int8), torch.tensor([[1, 3]], dtype=torch.uint8), spec)
    tensor([[ 7, -1,  6]], dtype=torch.int8)
    """
    if multiplier is None:
        return integers
    rows = integers.flatten(1)
    product = rows.short() * per_column(multiplier, rows.shape[1], spec)
    return product.to(torch.int8).view(integers.shape)


def divide(integers: torch.Tensor, multiplier: torch.Tensor | None, spec: QuantSpec) -> torch.Tensor:
    """`multiply` undone: int8 q from m q. If either tensor is on the meta device, the shape alone.

    Quotients of multiples are exact in float32; a zero in a damaged file is not told here, but by who loads it.
    """
    if multiplier is None or multiplier.is_meta or integers.is_meta:
        return integers
    rows = integers.flatten(1)
    quotient = rows / per_column(multiplier, rows.shape[1], spec)
    return quotient.to(torch.int8).view(integers.shape)


def column_scale(qparams: QParams, columns: int, spec: QuantSpec) -> torch.Tensor:
    """The step of each weight's integers, float32: s[c] m[c, g] as `[C, columns]`; without groups s[c] as `[C, 1]`."""
    scale = qparams.scale[:, None]
    if qparams.multiplier is None:
        return scale
    return scale * per_column(qparams.multiplier, columns, spec)


def to_nearest(weight: torch.Tensor, scale: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """`clamp(round(w / scale))`, float32 that holds integers, for a scale that broadcasts over `weight`."""
    return (weight * scale.reciprocal()).round_().clamp_(spec.qmin, spec.qmax)


def search_groups(weight: torch.Tensor, spec: QuantSpec, metric: str = "mse") -> QParams:
    """Each output channel's scale and the multipliers of its groups, chosen together.

    1. Each group's best scale by the range search, as if it were free.
    2. For each channel 100 base scales, from the largest of those down to it over the largest multiplier; the groups'
       scales become the nearest whole multiples; the least distance of the channel as a whole wins.

    `weight`: float `[C, ...]`. `metric`: as of `search_values`; "kl" and "minmax", which cannot compare a channel's
    values one by one, choose step 1 alone, and L_2.4 the base scale. Returns a scale `[C]` with multipliers
    `[C, groups]`. Raises as `search_values` does.

    >>> spec = QuantSpec(4, granularity="per_group", narrow=True, group_size=2)
    >>> found = search_groups(torch.tensor([[0.14, -0.02, 0.35, 0.05]]), spec, "minmax")
    >>> found.multiplier, round(float(found.scale), 3)
    (tensor([[2, 5]], dtype=torch.uint8), 0.01)
    """
    assert spec.group_size is not None
    alone = replace(spec, granularity="per_channel", group_size=None)
    rows = weight.detach().float().flatten(1)
    size = min(spec.group_size, rows.shape[1])
    # filled up with zeros, which cost nothing at any scale
    rows = F.pad(rows, (0, -rows.shape[1] % size)).unflatten(1, (-1, size))
    wanted = search_values(rows.flatten(0, 1), alone, metric).scale.view(rows.shape[:2])
    chosen = METRICS[metric]
    distance = lp if chosen.distance is None or chosen.binned else chosen.distance
    step = max(1, BLOCK // rows[0].numel())
    best = [_base(*block, spec, distance) for block in zip(rows.split(step), wanted.split(step), strict=True)]
    scale, multiplier = (torch.cat(part) for part in zip(*best, strict=True))
    return QParams(scale, torch.zeros_like(scale, dtype=torch.int32), multiplier.to(torch.uint8))


def _base(
    rows: torch.Tensor, wanted: torch.Tensor, spec: QuantSpec, distance: Distance
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step 2: rows `[C, groups, group_size]` and the scales they want, `[C, groups]` => `[C]`, `[C, groups]`."""
    top, most = wanted.amax(dim=1), most_multiplier(spec, LARGEST)
    scale, multiplier = top, torch.ones_like(wanted)
    smallest = torch.full_like(top, torch.inf, dtype=torch.float64)
    for i in range(CANDIDATES):
        base = (top / most ** (i / (CANDIDATES - 1))).clamp(min=SMALLEST_SCALE)
        m = (wanted / base[:, None]).round().clamp(1, most)
        step = (base[:, None] * m)[..., None]
        loss = distance(rows.flatten(1), (to_nearest(rows, step, spec) * step).flatten(1))
        better = loss < smallest * (1 - NOISE)
        scale, smallest = torch.where(better, base, scale), torch.where(better, loss, smallest)
        multiplier = torch.where(better[:, None], m, multiplier)
    return scale, multiplier

"""Weights whose neighbours stay within a limit, so that kernels that add two products in 16 bits add them exactly.

CPUs without VNNI multiply u8 by s8 and add the products of two neighbouring input channels 2 i and 2 i + 1, at the same
place of the kernel, in 16 bits that saturate (`vpmaddubsw`). With |w| of both adding up to at most 128 wherever their
signs agree, 255 * 128 < 2^15 holds whatever they are multiplied with; opposite signs never overflow:

    w1 w2 > 0   =>   |w1| + |w2| <= 128

Kernels take input channels by four; where these (of a layer's group) are no multiple of 4, other ones may be paired
(OpenVINO's product of matrices cuts K in two: benchmarks/pair_sums.py), and no limit is kept.

Few pairs of 8-bit weights break this (0.1 to 15 % by layer, docs/log.md, 2026-11-29). These are moved to the nearest
integers that do not, and a channel's scale is widened where that errs less. Weights of at most 7 bits never break it.
"""

from __future__ import annotations

import torch

from octavo.quantization.ranges import NOISE
from octavo.quantization.specs import QParams, QuantSpec

PAIR_SUM = 128
"""Two weights of one sign that add up to no more cannot overflow 16 bits, whatever they are multiplied with."""
WIDENINGS = tuple(2 ** (i / 16) for i in range(17))
"""What a channel's scale is multiplied with, of which the best is taken; at 2 no pair within the range breaks the
limit."""


def has_pairs(shape: torch.Size) -> bool:
    """Whether kernels add neighbouring inputs of a weight `[C, inputs, ...]`: not where they are no multiple of 4."""
    return shape[1] % 4 == 0


def partners(shape: torch.Size) -> torch.Tensor | None:
    """Of each column of a weight `[C, inputs, ...]` as `[C, K]`, the column that it is added with: int64 `[K]`.

    None where there are no pairs (`has_pairs`).

    >>> partners(torch.Size([8, 4])), partners(torch.Size([8, 4, 1, 2])), partners(torch.Size([8, 6]))
    (tensor([1, 0, 3, 2]), tensor([2, 3, 0, 1, 6, 7, 4, 5]), None)
    """
    inputs, places = shape[1], shape[2:].numel()
    if not has_pairs(shape):
        return None
    columns = torch.arange(inputs * places).view(inputs // 2, 2, places)
    return columns.flip(1).flatten()


def breaks_limit(integers: torch.Tensor) -> bool:
    """Whether some neighbours of an integer weight `[C, inputs, ...]`, of even inputs, break the limit.

    >>> breaks_limit(torch.tensor([[64, 64, 127, -127]])), breaks_limit(torch.tensor([[1, 65, 64, 0]]))
    (False, False)
    >>> breaks_limit(torch.tensor([[64, 65]])), breaks_limit(torch.tensor([[-64, -65]]))
    (True, True)
    """
    sums = integers[:, 0::2].to(torch.int16) + integers[:, 1::2]  # of opposite signs within 128 anyway
    smallest, largest = sums.aminmax()  # one pass
    return bool(largest > PAIR_SUM or smallest < -PAIR_SUM)


def to_nearest_pairs(
    weight: torch.Tensor, scale: torch.Tensor, partner: torch.Tensor, spec: QuantSpec
) -> torch.Tensor:
    """The integers within the limit that are nearest to w / scale: float32 `[C, K]` that holds them.

    `weight`: float `[C, K]`; `scale`: broadcasts over it; `partner`: as `partners` gives it, or with columns that are
    their own. Where two that are rounded to nearest break the limit, each gives half of what |w1| + |w2| is above it,
    and one that is beyond the range all the same leaves the other more.

    >>> spec, partner = QuantSpec(8, granularity="per_channel", narrow=True), torch.tensor([1, 0, 3, 2])
    >>> to_nearest_pairs(torch.tensor([[100.0, 90.0, 100.0, -90.0]]), torch.ones(1, 1), partner, spec)
    tensor([[ 69.,  59., 100., -90.]])
    >>> to_nearest_pairs(torch.tensor([[300.0, 90.0, 300.0, 1.0]]), torch.ones(1, 1), partner, spec)
    tensor([[127.,   1., 127.,   1.]])
    """
    values = weight * scale.reciprocal()
    first, second = _of_pairs(partner)
    one, other = _nearest_pair(values[:, first], values[:, second], spec)
    integers = values.round_().clamp_(spec.qmin, spec.qmax)
    integers[:, first], integers[:, second] = one, other
    return integers


def _of_pairs(partner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns of all pairs, the first and the second ones."""
    first = (partner > torch.arange(len(partner))).nonzero()[:, 0]
    return first, partner[first]


def _nearest_pair(
    one: torch.Tensor, other: torch.Tensor, spec: QuantSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two integers of each pair that are nearest to its values within the limit. Not in place."""
    nearest = one.clamp(spec.qmin, spec.qmax).round_()
    beside = other.clamp(spec.qmin, spec.qmax).round_()
    breaks = (nearest + beside).abs() > PAIR_SUM  # of opposite signs they are within 128 anyway
    mine = share(one, other, spec).round_()
    # what is left of the sum, not the other's own half rounded: both may lie on a border
    rest = PAIR_SUM * nearest.sign() - mine
    return torch.where(breaks, mine, nearest), torch.where(breaks, rest, beside)


def share(mine: torch.Tensor, others: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Of two values, not rounded, what `mine` is in the pair within the limit and the range that is nearest to both.

    Of one sign and beyond the limit: `mine` less half of what both are above it, and then cut to the range that two
    numbers have that add up to 128. Else `mine` cut to the range. Of a narrow range, as weights have it: -128 and 0 are
    not thought of.

    >>> spec = QuantSpec(8, granularity="per_channel", narrow=True)
    >>> share(torch.tensor([100.0, -100.0, 300.0, 90.0]), torch.tensor([90.0, 90.0, 90.0, 300.0]), spec)
    tensor([  69., -100.,  127.,    1.])
    """
    inside = mine.clamp(spec.qmin, spec.qmax)
    above = (inside + others.clamp(spec.qmin, spec.qmax)).abs() > PAIR_SUM  # of opposite signs they never are
    halved = mine.abs() - (mine.abs() + others.abs() - PAIR_SUM) / 2
    return torch.where(above, halved.clamp_(PAIR_SUM - spec.qmax, spec.qmax) * mine.sign(), inside)


def bounds(partner: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and the largest integer that a weight may become beside a partner that is one already.

    >>> spec = QuantSpec(8, granularity="per_channel", narrow=True)
    >>> bounds(torch.tensor([100.0, -100.0, 0.0]), spec)
    (tensor([-127.,  -28., -127.]), tensor([ 28., 127., 127.]))
    """
    smallest = (-PAIR_SUM - partner.clamp(max=0)).clamp_(min=spec.qmin)
    largest = (PAIR_SUM - partner.clamp(min=0)).clamp_(max=spec.qmax)
    return smallest, largest


def within(partner: torch.Tensor, part: slice) -> torch.Tensor:
    """The partners of the columns of `part` among themselves; of one whose partner is not there, itself.

    >>> within(torch.tensor([1, 0, 3, 2]), slice(0, 3))
    tensor([1, 0, 2])
    """
    mine = partner[part] - part.start
    own = torch.arange(len(mine))
    return torch.where((mine >= 0) & (mine < len(mine)), mine, own)


def paired_order(size: torch.Tensor, partner: torch.Tensor) -> torch.Tensor:
    """All columns, the two of a pair together, pairs by the larger `size` of the two from large to small. int64 `[K]`.

    >>> paired_order(torch.tensor([1.0, 5.0, 2.0, 3.0, 9.0]), torch.tensor([2, 1, 0, 4, 3]))
    tensor([3, 4, 1, 0, 2])
    """
    first = (partner >= torch.arange(len(partner))).nonzero()[:, 0]
    larger = torch.maximum(size, size[partner])[first]
    first = first[torch.argsort(larger, descending=True, stable=True)]
    both = torch.stack([first, partner[first]], dim=1)
    is_new = torch.stack([torch.ones_like(first, dtype=torch.bool), both[:, 0] != both[:, 1]], dim=1)
    return both[is_new]


def widened(rows: torch.Tensor, qparams: QParams, partner: torch.Tensor, spec: QuantSpec) -> QParams:
    """Scales for integers within the limit: of `WIDENINGS` times those given, each channel's with the least error.

    `rows`: a weight as float `[C, K]`; `qparams`: of its range search, `[C]`. The error is the sum of squares (by L_2.4
    or second moments layers came out the same, docs/log.md), of pairs near the limit and of values beyond the range at
    each factor f; of all others, whose error is that of rounding, at 1, times f^2. A channel that breaks no limit keeps
    its scale.
    """
    values = rows * qparams.scale[:, None].reciprocal()
    one, other = (values[:, columns] for columns in _of_pairs(partner))
    near = ((one + other).abs() > PAIR_SUM - 1) | (one.abs() > spec.qmax) | (other.abs() > spec.qmax)
    rounding = (one - one.round()).square_() + (other - other.round()).square_()
    rest = rounding.masked_fill_(near, 0).sum(dim=1, dtype=torch.float64)
    del values, rounding
    row = near.nonzero()[:, 0]
    one, other = one[near], other[near]
    breaks = (
        one.clamp(spec.qmin, spec.qmax).round() + other.clamp(spec.qmin, spec.qmax).round()
    ).abs() > PAIR_SUM
    best, smallest = torch.ones_like(qparams.scale), torch.full_like(rest, torch.inf)
    for factor in WIDENINGS:
        pair = _nearest_pair(one / factor, other / factor, spec)
        errors = (pair[0] * factor - one).square_() + (pair[1] * factor - other).square_()
        loss = (rest * factor**2).index_add_(0, row, errors.double())
        better = loss < smallest * (1 - NOISE)
        best, smallest = torch.where(better, factor, best), torch.where(better, loss, smallest)
    keeps = torch.ones_like(best, dtype=torch.bool)
    keeps[row[breaks]] = False
    return QParams(qparams.scale * torch.where(keeps, 1.0, best), qparams.zero_point)

"""Rounding that looks at what the weights are multiplied with: GPTQ (Frantar et al. 2210.17323), then descent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from octavo.errors import OctavoError
from octavo.quantization.groups import column_scale, multiply, to_nearest
from octavo.quantization.pairs import bounds, paired_order, partners, share, to_nearest_pairs, within
from octavo.quantization.specs import QParams, QuantSpec

BLOCK = 128
DAMPING = 0.01
SWEEPS = 2
ROWS = 2048
"""Output channels at a time, which do not depend on each other: three matrices of so many rows in float64."""


def output_error(
    weight: torch.Tensor, integers: torch.Tensor, scale: torch.Tensor, moment: torch.Tensor
) -> torch.Tensor:
    """E (w x - q x)^2 of each output channel: (w - q) M (w - q)^T with M = E[x x^T]. float64 `[C]`.

    `weight`: float `[C, K]`; `integers`: int8 `[C, K]`; `scale`: `[C]`, `[C, 1]` or `[C, K]`, q = scale * integers;
    `moment`: `[K, K]`, float32 or float64: in its dtype the products are computed.

    >>> output_error(torch.tensor([[1.0]]), torch.tensor([[3]]), torch.tensor([0.25]), torch.tensor([[4.0]]))
    tensor([0.2500], dtype=torch.float64)
    """
    difference = (weight.double() - integers.double() * scale.double().view(len(weight), -1)).to(moment.dtype)
    return ((difference @ moment) * difference).sum(dim=1, dtype=torch.float64)


def round_gptq(
    weight: torch.Tensor,
    moment: torch.Tensor,
    scale: torch.Tensor,
    spec: QuantSpec,
    *,
    damping: float = DAMPING,
    activation_order: bool = True,
    sweeps: int = SWEEPS,
    partner: torch.Tensor | None = None,
) -> torch.Tensor:
    """Integers that keep the layer's OUTPUT near, on given scales: int8 `[C, K]`.

    Minimises E ||W x - Q x||^2 = tr (W - Q) M (W - Q)^T, M = E[x x^T], over integers within the range of `spec`:

    1. Column by column each weight is rounded to nearest, and what that loses is made good by the columns that are
       still float: with U the upper Cholesky factor of M^-1, w[k:] -= (w[k] - q[k]) / U[k, k] * U[k, k:]
       (2210.17323, eq. 2-3 and section 3.3), in blocks of 128 columns. M is damped by `damping` * mean(diag M).
    2. `sweeps` times over all columns, each weight moves to the integer that is best given all the others.
    3. A channel that this leaves worse than rounding to nearest is rounded to nearest (`output_error`).

    `weight`: float `[C, K]`, not changed. `moment`: `[K, K]`, symmetric, positive semidefinite. `scale`: float32
    `[C, 1]`, or `[C, K]` where columns have scales of their own; Q = scale * integers. `activation_order`: columns with
    the largest second moment first. `partner`: int64 `[K]`, the column that each one's products are added with in 16
    bits, as `octavo.quantization.pairs` gives it: then all integers keep its limit, the first of two rounded by what
    the second is about to be, the second within what the first leaves; None: no limit. A column whose inputs are always
    0 (of a pair: both) is rounded to nearest. Raises `OctavoError` if shapes do not fit or the moment is not finite.

    >>> spec = QuantSpec(bits=2, granularity="per_channel")
    >>> alike = torch.tensor([[1.0, 1.0], [1.0, 1.0]])  # two inputs that are always equal
    >>> round_gptq(torch.tensor([[0.4, 0.4]]), alike, torch.ones(1, 1), spec).sum().item()
    1
    """
    return _round(weight, moment, scale, spec, damping, activation_order, sweeps, partner)[0]


class LayerRounding(NamedTuple):
    """`integers`: int8, those that execute. `nearest_error`, `error`: the sum over output channels of E (w x - q x)^2,
    of rounding to nearest and of `integers`."""

    integers: torch.Tensor
    nearest_error: float
    error: float


def round_layer(
    weight: torch.Tensor, moments: torch.Tensor, groups: int, qparams: QParams, spec: QuantSpec
) -> LayerRounding:
    """`round_gptq` of a whole layer's weight, by the parts of its second moment.

    `weight`: float `[C, ...]`. `moments`: `[parts, k, k]` as `SecondMoment.value` gives it: one part for each of the
    layer's `groups`, or, without groups, one for each block of columns, rounded as if other blocks did not matter (and
    the errors are those of such inputs). `qparams`: as `round_nearest` gives them for `spec`.
    """
    flat = weight.flatten(1)
    scale = column_scale(qparams, flat.shape[1], spec)
    integers = torch.empty(flat.shape, dtype=torch.int8)
    channels, columns = (len(flat) // groups, flat.shape[1]) if groups > 1 else (len(flat), moments.shape[-1])
    errors = torch.zeros(2, dtype=torch.float64)
    partner = partners(weight.shape) if spec.pair_limit else None
    for i, moment in enumerate(moments):
        rows = slice(i * channels, (i + 1) * channels) if groups > 1 else slice(None)
        part = slice(0, columns) if groups > 1 else slice(i * columns, (i + 1) * columns)
        mine = scale[rows] if scale.shape[1] == 1 else scale[rows, part]
        beside = None if partner is None else within(partner, part)
        integers[rows, part], of_part = _round(
            flat[rows, part], moment, mine, spec, DAMPING, True, SWEEPS, beside
        )
        errors += of_part
    if partner is not None:  # two blocks may have shared a pair
        integers = to_nearest_pairs(integers.float(), torch.ones(1, 1), partner, spec).to(torch.int8)
    return LayerRounding(multiply(integers, qparams.multiplier, spec).view(weight.shape), *errors.tolist())


def _round(
    weight: torch.Tensor,
    moment: torch.Tensor,
    scale: torch.Tensor,
    spec: QuantSpec,
    damping: float,
    activation_order: bool,
    sweeps: int,
    partner: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`round_gptq`, and the sums over channels of the errors of rounding to nearest and of its own integers."""
    _check(weight, moment, scale)
    moment = moment.to(torch.promote_types(moment.dtype, torch.float32))
    weight = weight.detach()
    if partner is None:
        nearest = to_nearest(weight.float(), scale, spec).to(torch.int8)
    else:
        nearest = to_nearest_pairs(weight.float(), scale, partner, spec).to(torch.int8)
    scale = scale.double().expand(weight.shape)
    rows = [slice(first, first + ROWS) for first in range(0, len(weight), ROWS)]
    before = torch.cat([output_error(weight[r], nearest[r], scale[r], moment) for r in rows])
    diagonal = moment.diagonal().double()
    if not bool((diagonal > 0).any()):
        return nearest, before.sum().expand(2)
    size = diagonal if activation_order else torch.zeros_like(diagonal)
    if partner is None:
        order, beside = torch.argsort(size, descending=True, stable=True), None
    else:
        order = paired_order(size, partner)
        beside = torch.argsort(order)[partner[order]].tolist()
    integers = torch.empty_like(nearest)
    upper = inverse_factor(moment, order, damping * float(diagonal.mean()))
    for r in rows:
        integers[r, order] = _columns(weight[r].double().T[order], upper, scale[r].T[order], spec, beside).T
    del upper
    after = torch.empty_like(before)
    beside = None if partner is None else partner.tolist()
    for r in rows:
        integers[r] = _descend(weight[r], integers[r], moment, scale[r], spec, sweeps, beside)
        after[r] = output_error(weight[r], integers[r], scale[r], moment)
    integers = torch.where((after <= before)[:, None], integers, nearest)
    errors = torch.stack([before.sum(), torch.minimum(before, after).sum()])
    never_read = diagonal <= 0
    if partner is not None:
        never_read &= diagonal[partner] <= 0  # one of two that is read keeps the other within the limit
    return torch.where(never_read[None], nearest, integers), errors


def inverse_factor(moment: torch.Tensor, order: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor U of the inverse, U^T U = (M + `damping` I)^-1, rows and columns of M in `order`.

    With R the upper factor of M + damping I = R R^T, which is the lower one of M back to front, U = R^-1: one
    factorization, and no inverse of M. `moment`: float `[K, K]`, left alone. Returns float64 `[K, K]`.

    >>> order, u = torch.arange(2), torch.tensor([[0.5, 0.25], [0.0, 1.0]], dtype=torch.float64)
    >>> inverse_factor(torch.linalg.inv(u.T @ u), order, 0.0)
    tensor([[0.5000, 0.2500],
            [0.0000, 1.0000]], dtype=torch.float64)
    """
    back = order.flip(0)
    damped = moment[back][:, back].double()
    damped.diagonal().add_(damping)
    lower = torch.linalg.cholesky(damped)
    del damped
    upper = lower.flip(0, 1)
    del lower
    _invert_upper(upper)
    return upper


def _invert_upper(matrix: torch.Tensor) -> None:
    """An upper triangular matrix becomes its inverse: [[A, B], [0, C]]^-1 = [[A^-1, -A^-1 B C^-1], [0, C^-1]]."""
    if len(matrix) <= 2 * BLOCK:
        matrix.copy_(torch.linalg.solve_triangular(matrix, torch.eye(len(matrix)).to(matrix), upper=True))
        return
    half = len(matrix) // 2
    first, last = matrix[:half, :half], matrix[half:, half:]
    _invert_upper(first)
    _invert_upper(last)
    matrix[:half, half:] = -(first @ matrix[:half, half:]) @ last


def _columns(
    weight: torch.Tensor,
    upper: torch.Tensor,
    scale: torch.Tensor,
    spec: QuantSpec,
    partner: Sequence[int] | None = None,
) -> torch.Tensor:
    """Step 1: int8 `[K, C]`. `weight`, `scale`: `[K, C]`, a column of the layer's weight in a row; `weight` is used up.

    A row is what lies together in memory: nearly all the time goes into these. `partner`: of each row the one that it
    keeps the limit of pairs with, itself for none.
    """
    integers = torch.empty(weight.shape, dtype=torch.int8)
    for first in range(0, len(weight), BLOCK):
        last = min(first + BLOCK, len(weight))
        errors = torch.empty(last - first, weight.shape[1], dtype=torch.float64)
        for k in range(first, last):
            rounded = weight[k] / scale[k]
            if partner is None or partner[k] == k:
                rounded.round_().clamp_(spec.qmin, spec.qmax)
            elif (other := partner[k]) > k:
                rounded = share(rounded, weight[other] / scale[other], spec).round_()
            else:
                rounded.round_().clamp_(*bounds(integers[other].double(), spec))
            integers[k] = rounded
            errors[k - first] = (weight[k] - rounded * scale[k]) / upper[k, k]
            weight[k + 1 : last].addr_(upper[k, k + 1 : last], errors[k - first], alpha=-1)
        weight[last:] -= upper[first:last, last:].T @ errors
    return integers


def _descend(
    weight: torch.Tensor,
    integers: torch.Tensor,
    moment: torch.Tensor,
    scale: torch.Tensor,
    spec: QuantSpec,
    sweeps: int,
    partner: Sequence[int] | None = None,
) -> torch.Tensor:
    """Step 2: each weight in turn to its best integer, the others held, within what its partner's leaves (`_columns`).

    With g = (Q - W) M, the best change of column k is -g[k] / M[k, k]; rounded to whole steps of the scale. The error
    never grows but for what is rounded in g, which is kept over all sweeps in the moment's dtype: in float32 a weight
    that lies close to the border of two integers may go to the other one, closer the larger its own moment is.
    """
    weight, values, scale = (x.T.to(moment.dtype).contiguous() for x in (weight, integers, scale))
    gradient = moment @ (values * scale - weight)
    own = moment.diagonal().tolist()
    for sweep in range(sweeps):
        for first in range(0, len(values), BLOCK):
            last = min(first + BLOCK, len(values))
            block = gradient[first:last].clone()
            changes = torch.zeros_like(block)
            for k in range(first, last):
                if own[k] <= 0:
                    continue
                target = values[k] - block[k - first] / own[k] / scale[k]
                best = target.round_()
                if partner is None or partner[k] == k:
                    best.clamp_(spec.qmin, spec.qmax)
                else:
                    best.clamp_(*bounds(values[partner[k]], spec))
                changes[k - first] = (best - values[k]) * scale[k]
                values[k] = best
                block[k + 1 - first :].addr_(moment[k, k + 1 : last], changes[k - first])
            read = last if sweep == sweeps - 1 else 0
            gradient[read:].addmm_(moment[read:, first:last], changes)
    return values.T.to(torch.int8).contiguous()


def _check(weight: torch.Tensor, moment: torch.Tensor, scale: torch.Tensor) -> None:
    channels, columns = weight.shape
    if moment.shape != (columns, columns):
        raise OctavoError(f"moment: {tuple(moment.shape)} does not fit a weight of {columns} columns")
    if scale.shape not in ((channels, 1), (channels, columns)):
        raise OctavoError(
            f"scale: {tuple(scale.shape)} does not fit {channels} channels of {columns} columns"
        )
    if not bool(torch.isfinite(moment).all()):
        raise OctavoError("moment: not finite; the layer's inputs hold inf or nan")

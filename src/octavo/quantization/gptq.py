"""Rounding that looks at what the weights are multiplied with: GPTQ (Frantar et al. 2210.17323), then descent."""

from __future__ import annotations

import torch

from octavo.errors import OctavoError
from octavo.quantization.groups import column_scale, multiply, to_nearest
from octavo.quantization.specs import QParams, QuantSpec

BLOCK = 128
DAMPING = 0.01
SWEEPS = 2


def output_error(
    weight: torch.Tensor, integers: torch.Tensor, scale: torch.Tensor, moment: torch.Tensor
) -> torch.Tensor:
    """E (w x - q x)^2 of each output channel: (w - q) M (w - q)^T with M = E[x x^T]. float64 `[C]`.

    `weight`: float `[C, K]`; `integers`: int8 `[C, K]`; `scale`: `[C]`, `[C, 1]` or `[C, K]`, q = scale * integers;
    `moment`: `[K, K]`.

    >>> output_error(torch.tensor([[1.0]]), torch.tensor([[3]]), torch.tensor([0.25]), torch.tensor([[4.0]]))
    tensor([0.2500], dtype=torch.float64)
    """
    difference = weight.double() - integers.double() * scale.double().view(len(weight), -1)
    return ((difference @ moment.double()) * difference).sum(dim=1)


def round_gptq(
    weight: torch.Tensor,
    moment: torch.Tensor,
    scale: torch.Tensor,
    spec: QuantSpec,
    *,
    damping: float = DAMPING,
    activation_order: bool = True,
    sweeps: int = SWEEPS,
) -> torch.Tensor:
    """Integers that keep the layer's OUTPUT near, on given scales: int8 `[C, K]`.

    Minimises E ||W x - Q x||^2 = tr (W - Q) M (W - Q)^T, M = E[x x^T], over integers within the range of `spec`:

    1. Column by column each weight is rounded to nearest, and what that loses is made good by the columns that are
       still float: with U the upper Cholesky factor of M^-1, w[k:] -= (w[k] - q[k]) / U[k, k] * U[k, k:]
       (2210.17323, eq. 2-3 and section 3.3), in blocks of 128 columns. M is damped by `damping` * mean(diag M).
    2. `sweeps` times over all columns, each weight moves to the integer that is best given all the others.
    3. A channel that this leaves worse than rounding to nearest is rounded to nearest.

    `weight`: float `[C, K]`, not changed. `moment`: `[K, K]`, symmetric, positive semidefinite. `scale`: float32
    `[C, 1]`, or `[C, K]` where columns have scales of their own; Q = scale * integers. `activation_order`: columns with
    the largest second moment first. A column whose inputs are always 0 is rounded to nearest. Raises `OctavoError` if
    shapes do not fit or the moment is not finite.

    >>> spec = QuantSpec(bits=2, granularity="per_channel")
    >>> alike = torch.tensor([[1.0, 1.0], [1.0, 1.0]])  # two inputs that are always equal
    >>> round_gptq(torch.tensor([[0.4, 0.4]]), alike, torch.ones(1, 1), spec).sum().item()
    1
    """
    _check(weight, moment, scale)
    nearest = to_nearest(weight.detach().float(), scale, spec).to(torch.int8)
    weight, moment = weight.detach().double(), moment.double()
    scale = scale.double().expand(weight.shape)
    diagonal = moment.diagonal()
    if not bool((diagonal > 0).any()):
        return nearest
    damped = moment + torch.eye(len(moment), dtype=torch.float64) * (damping * diagonal.mean())
    order = torch.argsort(diagonal, descending=True, stable=True) if activation_order else None
    if order is not None:
        damped = damped[order][:, order]
        integers = torch.empty_like(nearest)
        integers[:, order] = _columns(weight[:, order], damped, scale[:, order], spec)
    else:
        integers = _columns(weight, damped, scale, spec)
    for _ in range(sweeps):
        integers = _descend(weight, integers, moment, scale, spec)
    worse = output_error(weight, integers, scale, moment) > output_error(weight, nearest, scale, moment)
    integers = torch.where(worse[:, None], nearest, integers)
    return torch.where((diagonal > 0)[None], integers, nearest)


def round_layer(
    weight: torch.Tensor, moments: torch.Tensor, groups: int, qparams: QParams, spec: QuantSpec
) -> torch.Tensor:
    """`round_gptq` of a whole layer's weight, by the parts of its second moment: int8 of the weight's shape.

    `weight`: float `[C, ...]`. `moments`: `[parts, k, k]` as `SecondMoment.value` gives it: one part for each of the
    layer's `groups`, or, without groups, one for each block of columns, rounded as if other blocks did not matter.
    `qparams`: as `round_nearest` gives them for `spec`. Returns, as it does, the integers that execute.
    """
    flat = weight.flatten(1)
    scale = column_scale(qparams, flat.shape[1], spec)
    integers = torch.empty(flat.shape, dtype=torch.int8)
    channels, columns = (len(flat) // groups, flat.shape[1]) if groups > 1 else (len(flat), moments.shape[-1])
    for i, moment in enumerate(moments):
        rows = slice(i * channels, (i + 1) * channels) if groups > 1 else slice(None)
        part = slice(None) if groups > 1 else slice(i * columns, (i + 1) * columns)
        mine = scale[rows] if scale.shape[1] == 1 else scale[rows, part]
        integers[rows, part] = round_gptq(flat[rows, part], moment, mine, spec)
    return multiply(integers, qparams.multiplier, spec).view(weight.shape)


def _columns(
    weight: torch.Tensor, moment: torch.Tensor, scale: torch.Tensor, spec: QuantSpec
) -> torch.Tensor:
    """Step 1: int8 `[C, K]`, columns in the order given."""
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moment)), upper=True)
    weight = weight.clone()
    integers = torch.empty(weight.shape, dtype=torch.int8)
    columns = weight.shape[1]
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        errors = torch.zeros(weight.shape[0], last - first, dtype=torch.float64)
        for k in range(first, last):
            rounded = (weight[:, k] / scale[:, k]).round().clamp(spec.qmin, spec.qmax)
            integers[:, k] = rounded.to(torch.int8)
            error = (weight[:, k] - rounded * scale[:, k]) / upper[k, k]
            weight[:, k:last] -= error[:, None] * upper[k, k:last]
            errors[:, k - first] = error
        weight[:, last:] -= errors @ upper[first:last, last:]
    return integers


def _descend(
    weight: torch.Tensor,
    integers: torch.Tensor,
    moment: torch.Tensor,
    scale: torch.Tensor,
    spec: QuantSpec,
) -> torch.Tensor:
    """Step 2: each weight in turn to its best integer, the others held. The error never grows.

    With g = (Q - W) M, the best change of column k is -g[k] / M[k, k]; rounded to whole steps of the scale.
    """
    values = integers.double()
    gradient = (values * scale - weight) @ moment
    columns = weight.shape[1]
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        inner = gradient[:, first:last].clone()
        changes = torch.zeros_like(inner)
        for k in range(first, last):
            own = moment[k, k]
            if own <= 0:
                continue
            target = values[:, k] - inner[:, k - first] / own / scale[:, k]
            best = target.round().clamp(spec.qmin, spec.qmax)
            change = (best - values[:, k]) * scale[:, k]
            values[:, k] = best
            inner += change[:, None] * moment[k, first:last]
            changes[:, k - first] = change
        gradient += changes @ moment[first:last]
    return values.to(torch.int8)


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

"""The range search: 100 candidate ranges, the one with the smallest distance wins (PTQ4DM eq. 12-13).

Candidate i of 1..100 is i/100 of [min, max]. Everything works on rows `[R, N]` with one range per row: a
weight has a row per output channel, an activation is one row of values or of histogram points with their
counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from octavo.errors import OctavoError
from octavo.quantization.affine import SMALLEST_SCALE, _qparams, fake_quantize
from octavo.quantization.grid import count, exponent_of, points_of
from octavo.quantization.metrics import METRICS, Distance, Metric, l1, lp
from octavo.quantization.specs import QParams, QuantSpec
from octavo.threads import torch_threads

Ends = Literal["joint", "separate"]
CANDIDATES = 100
BINS = 8192  # of an activation's histogram
_CHANNEL_BINS = 1024  # of one channel's weights, where a metric wants them binned
_POINTS_PER_BIN = 4  # a low candidate's step can be finer than a bin
NOISE = 1e-10  # relative: distances closer than this are equal, they differ by float64 rounding alone
LOOKS = 5  # candidates between two looks at whether narrower ones can still win
ROUNDING = 1e-3  # relative: far more than float32 can add to a sum of distances
BLOCK = 1 << 16  # values searched at a time: small enough to stay in the cache through all candidates


def search_values(x: torch.Tensor, spec: QuantSpec, metric: str = "mse", ends: Ends = "separate") -> QParams:
    """The best of the candidate ranges for `x`, every value counted.

    `x`: float, any shape; per channel, each `x[c]` gets its own range. `metric`: a name in `METRICS`. `ends`:
    "joint" shrinks both ends by the same factor; "separate" then searches 100 candidates of the low end, and
    after it 100 of the high end (asymmetric specs only; a symmetric range has one end). Equal distances go to
    the wider range. Returns float32 `[]` or `[C]`. Raises `OctavoError` on empty or non-finite values, on an
    unknown metric or `ends`.

    >>> x = torch.cat([torch.linspace(-1, 1, 1000), torch.tensor([2.0])])
    >>> wide = search_values(x, QuantSpec(bits=4), "minmax").scale
    >>> bool(search_values(x, QuantSpec(bits=4), "mse").scale < wide)
    True
    """
    chosen = _check(metric, ends)
    if spec.granularity == "per_group":
        raise OctavoError("range search: groups depend on each other; `search_groups` chooses their scales")
    if x.numel() == 0:
        raise OctavoError(f"range search: a tensor of shape {list(x.shape)} has no values")
    rows = x.detach().float()
    rows = rows.reshape(1, -1) if spec.granularity == "per_tensor" else rows.reshape(x.shape[0], -1)
    low, high = rows.aminmax(dim=1)
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise OctavoError("range search: the values hold NaN or infinity")
    if chosen.distance is None or spec.is_float:
        return _result(spec, low, high)
    if chosen.binned:
        bins = BINS if spec.granularity == "per_tensor" else _CHANNEL_BINS
        step = max(1, BLOCK // min(bins, rows.shape[1]))
    else:
        step = max(1, BLOCK // rows.shape[1])
    best = []
    for block, block_low, block_high in zip(rows.split(step), low.split(step), high.split(step), strict=True):
        points, weights, finest = block, None, None
        if chosen.binned:
            points, weights, finest = _binned(block, block_low, block_high, bins)
        best.append(_search(points, weights, block_low, block_high, spec, chosen.distance, ends, finest))
    return _result(spec, *(torch.cat(end) for end in zip(*best, strict=True)))


def search_histogram(
    counts: torch.Tensor,
    exponent: int,
    low: torch.Tensor,
    high: torch.Tensor,
    spec: QuantSpec,
    metric: str = "mse",
    ends: Ends = "separate",
) -> QParams:
    """The best of the candidate ranges for values counted on a grid (`grid.py`): `counts` int64 `[8192]`.

    `low`, `high`: float32 `[]`, the exact ends of the values, so that the candidates are those of
    `search_values`. Other arguments, result and errors as there; `spec` must be per tensor.

    >>> from octavo.quantization.grid import count
    >>> x = torch.linspace(-1, 0.99, 1000)
    >>> qparams = search_histogram(count(x, -12, BINS), -12, x[0], x[-1], QuantSpec())
    >>> torch.equal(qparams.scale, search_values(x, QuantSpec()).scale)
    True
    """
    chosen = _check(metric, ends)
    if spec.granularity != "per_tensor":
        raise OctavoError("range search: a histogram has one range, so the spec must be per_tensor")
    low, high = low.view(1), high.view(1)
    if chosen.distance is None or spec.is_float:
        return _result(spec, low, high)
    finest = None
    if chosen.binned:
        points, weights = points_of(_without_zeros(counts), exponent)
        finest = low.new_full((1,), 2.0**exponent)
    else:
        points, weights = points_of(counts, exponent, _POINTS_PER_BIN)
    points = points.clamp(low, high)
    best = _search(points.view(1, -1), weights.view(1, -1), low, high, spec, chosen.distance, ends, finest)
    return _result(spec, *best)


@torch_threads(1)
def _search(
    x: torch.Tensor,
    weights: torch.Tensor | None,
    low: torch.Tensor,
    high: torch.Tensor,
    spec: QuantSpec,
    distance: Distance,
    ends: Ends,
    finest: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best float64 `[R]` ends for rows `[R, N]`, histograms with bins `finest` `[R]` wide where that is given."""
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    grows = distance in (lp, l1)

    def best_of(candidate: Callable[[float], tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """The winning fraction of each row, `[R]`; from wide to narrow, so that ties go to the wider."""
        best, smallest = torch.ones_like(low), torch.full_like(low, torch.inf)
        for i in range(CANDIDATES, 0, -1):
            range_ = candidate(i / CANDIDATES)
            qparams = _qparams(spec, *range_)
            x_sim = fake_quantize(x, qparams, spec)
            if finest is None:
                loss = distance(x, x_sim, weights, -1)
            else:
                step = qparams.scale.view(-1, 1)
                loss = distance(x, x_sim, weights, -1, step=step).where(step[:, 0] >= finest, torch.inf)
            better = loss < smallest * (1 - NOISE)
            best, smallest = best.masked_fill(better, i / CANDIDATES), torch.where(better, loss, smallest)
            if (
                grows
                and i % LOOKS == 0
                and _narrower_lose(x, weights, range_, qparams, spec, smallest, distance)
            ):
                break
        return best

    joint = best_of(lambda f: (low * f, high * f))
    if ends == "joint" or spec.symmetric:
        return low * joint, high * joint
    low_end = low * best_of(lambda f: (low * f, high * joint))
    return low_end, high * best_of(lambda f: (low_end, high * f))


def _narrower_lose(
    x: torch.Tensor,
    weights: torch.Tensor | None,
    range_: tuple[torch.Tensor, torch.Tensor],
    qparams: QParams,
    spec: QuantSpec,
    smallest: torch.Tensor,
    distance: Distance,
) -> bool:
    """Whether no row `[R, N]` can gain by a range within this one: what is proven, not guessed.

    The integers of a range [l, h] with step s hold [round(l/s) s, round(l/s) s + (h - l)], at most [l - s/2, h + s/2],
    and so do those of every range within it, whose steps are no larger. A value beyond that is off by at least what it
    is beyond, d(x); so the L_p distance of all those ranges is at least sum_j w_j d(x_j)^p.
    """
    if not spec.symmetric and not bool((qparams.scale > CANDIDATES * SMALLEST_SCALE).all()):
        return False  # a narrower range's step could be that floor, and hold more than this one's
    step = qparams.scale.view(-1, 1)
    if spec.symmetric:
        low, high = spec.qmin * step, spec.qmax * step
    else:
        low, high = (end.view(-1, 1).to(step) for end in range_)
        low, high = low - step / 2, high + step / 2
    held = x.clamp(low, high)
    return bool((distance(x, held, weights) > smallest * (1 + ROUNDING)).all())


def _binned(
    rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bins: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The histogram of each row `[R, N]`, on an observer's grid: points and counts `[R, M]`, widths of bins `[R]`.

    M is the most bins that a row occupies; a shorter row ends in points at its high end with a count of 0.
    """
    points, weights, widths = [], [], []
    for row, row_low, row_high in zip(rows, low.tolist(), high.tolist(), strict=True):
        exponent = exponent_of(row_low, row_high, bins)
        row_points, row_weights = points_of(_without_zeros(count(row, exponent, bins)), exponent)
        points.append(row_points)
        weights.append(row_weights)
        widths.append(2.0**exponent)
    padded = pad_sequence(points, batch_first=True, padding_value=math.inf).clamp(low[:, None], high[:, None])
    return padded, pad_sequence(weights, batch_first=True), low.new_tensor(widths)


def _without_zeros(counts: torch.Tensor) -> torch.Tensor:
    """The counts but for the bin that holds 0: every range keeps 0 exact (as TensorRT does)."""
    counts = counts.clone()
    counts[counts.numel() // 2] = 0
    return counts


def _result(spec: QuantSpec, low: torch.Tensor, high: torch.Tensor) -> QParams:
    qparams = _qparams(spec, low.double(), high.double())
    if spec.granularity == "per_channel":
        return qparams
    return QParams(qparams.scale[0], qparams.zero_point[0])


def _check(metric: str, ends: str) -> Metric:
    if metric not in METRICS:
        raise OctavoError(f"metric: {metric!r} is not one of {', '.join(METRICS)}")
    if ends not in ("joint", "separate"):
        raise OctavoError(f"ends: {ends!r} is neither 'joint' nor 'separate'")
    return METRICS[metric]

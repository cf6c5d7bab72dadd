"""The search of an activation's scales by timestep group: one zero point for all, so that one kernel serves them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from octavo.errors import OctavoError
from octavo.quantization.affine import SMALLEST_SCALE, qparams_from_range
from octavo.quantization.grid import points_of
from octavo.quantization.metrics import METRICS, Metric
from octavo.quantization.observers import HistogramObserver
from octavo.quantization.ranges import CANDIDATES, NOISE
from octavo.quantization.specs import QParams, QuantSpec
from octavo.threads import torch_threads


@dataclass(frozen=True)
class GroupedScales:
    """What one layer's input is quantized with.

    qparams   scale float32 [] and zero point int32 [] of the fixed quantizer, as good as one scale for all groups is.
    factors   float32 [G]: group g's input is multiplied by `qparams.scale / scale of g` in front of that quantizer.
    error     the squared error over all groups with a scale each, over that of the best range for all of them.
    """

    qparams: QParams
    factors: torch.Tensor
    error: float


@dataclass(frozen=True)
class _Seen:
    """A group's histogram as points and counts, float32 and float64 [P], its exact ends, and the width of its bins."""

    points: torch.Tensor
    counts: torch.Tensor
    low: float
    high: float
    width: float

    @classmethod
    def of(cls, observer: HistogramObserver) -> _Seen:
        points, counts = points_of(observer.counts, observer.exponent)
        low, high = min(observer.low, 0.0), max(observer.high, 0.0)
        return cls(points.clamp(observer.low, observer.high), counts, low, high, 2.0**observer.exponent)


@torch_threads(1)
def search_grouped_scales(
    groups: Sequence[HistogramObserver], spec: QuantSpec, metric: str = "mse"
) -> GroupedScales:
    """The best scale of each group of values, and the zero point that all of them share.

        x_q = (clamp(round(x r[g] / s) + z, qmin, qmax) - z) s / r[g],      r[g] = s / s[g]

    A group's candidates are 1/100 to 100/100 of the scale that holds its minimum and, apart from those, of the scale
    that holds its maximum, both with the zero point given; the one with the smallest distance by `metric` wins
    (PTQ4DM, 2211.15736, eq. 12-13, with z held). The zero points tried are those that the range search finds for all
    groups together, and those which the same share of each group's own range would ask for; the one that leaves the
    smallest squared error over all groups wins. A symmetric spec has none but 0.

    `groups`: what was observed of each, none of them empty; `spec`: per tensor; `metric`: a name in `METRICS`. Raises
    `OctavoError` for an empty group.

    >>> quiet, loud = HistogramObserver(), HistogramObserver()
    >>> quiet.observe(torch.linspace(-1, 1, 1000)), loud.observe(torch.linspace(-8, 8, 1000))
    (None, None)
    >>> found = search_grouped_scales([quiet, loud], QuantSpec(8))
    >>> [round(float(f), 2) for f in found.factors / found.factors[1]]
    [8.0, 1.0]
    """
    whole = HistogramObserver()
    for observer in groups:
        if observer.low > observer.high:
            raise OctavoError("timestep_groups: a group in which nothing was observed has no scale")
        whole.merge(observer)
    one = whole.qparams(spec, metric)
    seen, together = [_Seen.of(observer) for observer in groups], _Seen.of(whole)
    found = {
        z: sum(_least(group, z, spec, Metric(_squares))[1] for group in seen)
        for z in _zero_points(one, together, seen, spec)
    }
    z = min(found, key=lambda zero_point: found[zero_point])
    chosen = METRICS[metric]
    scale = _scale_of(together, z, spec, chosen)
    scales = torch.stack([_scale_of(group, z, spec, chosen) for group in seen])
    error = sum(_error(group, float(s), z, spec) for group, s in zip(seen, scales, strict=True))
    before = sum(_error(group, float(one.scale), int(one.zero_point), spec) for group in seen)
    qparams = QParams(scale, torch.tensor(z, dtype=torch.int32))
    return GroupedScales(qparams, scale / scales, error / before if before else 1.0)


def _zero_points(one: QParams, together: _Seen, seen: Sequence[_Seen], spec: QuantSpec) -> list[int]:
    """Candidates, each once: of the range for all, and of the same shares of each group's minimum and maximum."""
    zero_points = [int(one.zero_point)]
    if spec.symmetric:
        return zero_points
    ends = [(end - zero_points[0]) * float(one.scale) for end in (spec.qmin, spec.qmax)]
    low = ends[0] / together.low if together.low else 0.0
    high = ends[1] / together.high if together.high else 0.0
    for group in seen:
        if group.low or group.high:
            of_group = qparams_from_range(spec, low * group.low, high * group.high)
            zero_points.append(int(of_group.zero_point))
    return list(dict.fromkeys(zero_points))


def _candidates(group: _Seen, z: int, spec: QuantSpec) -> torch.Tensor:
    """Scales, descending, float32 [up to 200]."""
    fractions = torch.arange(CANDIDATES, 0, -1, dtype=torch.float64) / CANDIDATES
    most = {
        group.low / (spec.qmin - z) if z > spec.qmin else 0.0,
        group.high / (spec.qmax - z) if z < spec.qmax else 0.0,
    }
    if spec.symmetric:
        most = {max(-group.low, group.high) / spec.qmax}
    scales = torch.cat([fractions * end for end in sorted(most) if end > 0] or [torch.zeros(1).double()])
    return scales.clamp(min=SMALLEST_SCALE).float().unique().flip(0)


def _scale_of(group: _Seen, z: int, spec: QuantSpec, metric: Metric) -> torch.Tensor:
    """float32 []. Without a distance ("minmax") the scale that holds all values."""
    if metric.distance is None:
        return _candidates(group, z, spec)[0]
    return _least(group, z, spec, metric)[0]


def _least(group: _Seen, z: int, spec: QuantSpec, metric: Metric) -> tuple[torch.Tensor, float]:
    """The candidate of the smallest distance, and the distance; of equal ones the widest."""
    assert metric.distance is not None
    scales = _candidates(group, z, spec)[:, None]
    points, counts = group.points, group.counts
    if metric.binned:
        elsewhere = (points < 0) | (points >= group.width)  # 0 stays exact in every range
        points, counts = points[elsewhere], counts[elsewhere]
    x = points.expand(len(scales), -1)
    x_sim = _rounded(points, scales, z, spec)
    weights = counts.expand(len(scales), -1)
    if metric.binned:
        distances = metric.distance(x, x_sim, weights, -1, step=scales)
        distances = distances.where(scales[:, 0] >= group.width, torch.inf)
    else:
        distances = metric.distance(x, x_sim, weights, -1)
    smallest = distances.min()
    best = int((distances <= smallest * (1 + NOISE)).nonzero()[0]) if bool(smallest.isfinite()) else 0
    return scales[best, 0], float(distances[best])


def _rounded(points: torch.Tensor, scales: torch.Tensor, z: int, spec: QuantSpec) -> torch.Tensor:
    return (points / scales).round_().clamp_(spec.qmin - z, spec.qmax - z).mul_(scales)


def _squares(x: torch.Tensor, x_sim: torch.Tensor, weights: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """As `octavo.quantization.metrics.lp` with p = 2, summed in float32: it is asked thousands of times."""
    return ((x - x_sim).square_() * weights.float()).sum(dim)


def _error(group: _Seen, scale: float, z: int, spec: QuantSpec) -> float:
    x_sim = _rounded(group.points, torch.tensor(scale), z, spec)
    return float(_squares(group.points, x_sim, group.counts))

"""Charts as plain geometry: everything in percent of the plot, so that lines stretch and letters do not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from octavo.report.data import CalibrationSteps, ErrorMap, Interval, RangeOverTime, Row, TradeOffPoint


@dataclass(frozen=True)
class Axis:
    """A scale from `low` to `high`, logarithmic or not, with the values at which it is labelled.

    `reverse`: `high` comes first, for figures of which less is better.

    >>> Axis(0, 4, [0, 2, 4]).at(1), Axis(1, 100, [1, 10, 100], log=True).at(10), Axis(0, 4, reverse=True).at(1)
    (25.0, 50.0, 75.0)
    """

    low: float
    high: float
    ticks: list[float] = field(default_factory=list)
    log: bool = False
    reverse: bool = False

    def at(self, value: float) -> float:
        """Percent of the way from the first end to the last, cut to [0, 100]."""
        low, high = (math.log(end) if self.log else end for end in (self.low, self.high))
        place = math.log(max(value, self.low)) if self.log else value
        share = min(max((place - low) / (high - low), 0.0), 1.0)
        return round(100 * (1 - share if self.reverse else share), 2)

    @property
    def labels(self) -> list[Row]:
        return [{"text": short(tick), "at": self.at(tick)} for tick in self.ticks]


def linear_axis(low: float, high: float, count: int = 4) -> Axis:
    """An axis over [low, high] with about `count` ticks at 1, 2 or 5 times a power of ten.

    >>> linear_axis(0.3, 9.8).ticks
    [2.0, 4.0, 6.0, 8.0]
    """
    if not high > low:
        low, high = low - 0.5, high + 0.5
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = min((power * factor for factor in (1, 2, 5, 10)), key=lambda s: abs((high - low) / s - count))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Axis(low, high, [float(f"{k * step:.12g}") for k in range(first, last + 1)])


def log_axis(low: float, high: float) -> Axis:
    """A logarithmic axis over [low, high], labelled at 1, 2 and 5 times powers of ten, or at powers alone.

    >>> log_axis(0.8, 30).ticks
    [1.0, 2.0, 5.0, 10.0, 20.0]
    """
    high = max(high, low * 1.2)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    all_ticks = [float(f"{factor * 10.0**power:.6g}") for power in powers for factor in (1, 2, 5)]
    ticks = [tick for tick in all_ticks if low <= tick <= high]
    if len(ticks) > 6:
        ticks = [tick for tick in ticks if math.log10(tick).is_integer()]
    return Axis(low, high, ticks, log=True)


def path(x: Axis, y: Axis, xs: Sequence[float], ys: Sequence[float]) -> str:
    """A polyline's points, y downwards as SVG has it."""
    return " ".join(f"{x.at(a):g},{100 - y.at(b):g}" for a, b in zip(xs, ys, strict=True))


def band(x: Axis, y: Axis, xs: Sequence[float], low: Sequence[float], high: Sequence[float]) -> str:
    """The polygon between two lines."""
    return f"{path(x, y, xs, high)} {path(x, y, xs[::-1], low[::-1])}"


def short(value: float) -> str:
    """A number for a tick: no more digits than it has.

    >>> [short(value) for value in (0.0, 0.05, 20.0, 1500.0, -2.5)]
    ['0', '0.05', '20', '1500', '\u22122.5']
    """
    return f"{value:.6g}".replace("-", "\N{MINUS SIGN}")


def trade_off_chart(points: Sequence[TradeOffPoint]) -> Row | None:
    """Quality (PSNR) against seconds an image, one line an engine; the reference itself is drawn at the top."""
    if not points:
        return None
    unit, factor = ("ms", 1e3) if max(point.seconds.value for point in points) < 2 else ("s", 1.0)
    times = [factor * point.seconds.value for point in points]
    x = log_axis(min(times) / 1.3, max(times) * 1.3)
    decibels = [end for point in points if point.psnr for end in ends(point.psnr)]
    y = linear_axis(min(decibels, default=0.0) - 2, max(decibels, default=60.0) + 6)
    series: list[Row] = []
    for engine in dict.fromkeys(point.engine for point in points):
        # lines climb from lower left to upper right: what is above left of them, or below right, is free
        side = "above" if series else "below"
        own = sorted((p for p in points if p.engine == engine), key=lambda p: p.steps)
        marks = [_mark(point, factor, x, y, side) for point in own]
        series.append(
            {
                "engine": engine,
                "marks": marks,
                "line": " ".join(f"{m['x']:g},{100 - m['y']:g}" for m in marks),
            }
        )
    return {"x": x, "y": y, "unit": unit, "factor": factor, "series": series}


def _mark(point: TradeOffPoint, factor: float, x: Axis, y: Axis, side: str) -> Row:
    low, high = ends(point.psnr) if point.psnr else (y.high, y.high)
    return {
        "x": x.at(factor * point.seconds.value),
        "y": y.at(point.psnr.value) if point.psnr else 100.0,
        "low": y.at(low),
        "high": y.at(high),
        "steps": point.steps,
        "side": side if point.psnr else "left",
    }


def range_chart(found: RangeOverTime) -> Row:
    """Bands of what the layer reads over the steps, with the chosen range's two ends."""
    steps = [float(i) for i in range(len(found.timesteps))]
    x = Axis(0, max(steps[-1], 1))
    span = max(*found.maximum, found.high) - min(*found.minimum, found.low)
    y = linear_axis(
        min(*found.minimum, found.low) - 0.04 * span, max(*found.maximum, found.high) + 0.04 * span, 4
    )
    columns = list(zip(*found.quantiles, strict=True))
    return {
        "y": y,
        "extremes": band(x, y, steps, found.minimum, found.maximum),
        "outer": band(x, y, steps, columns[1], columns[5]),
        "inner": band(x, y, steps, columns[2], columns[4]),
        "median": path(x, y, steps, columns[3]),
        "low": y.at(found.low),
        "high": y.at(found.high),
        "most_outside": max(found.outside),
        "at": found.timesteps[max(range(len(found.outside)), key=found.outside.__getitem__)],
        "ends": (short(found.timesteps[0]), short(found.timesteps[-1])),
    }


def calibration_chart(found: CalibrationSteps) -> Row:
    """Bars: pairs at each step, from the noisy end; at most 60 bars, wider ones for longer samplers."""
    width = -(-len(found.pairs) // 60)
    bars = [sum(found.pairs[i : i + width]) for i in range(0, len(found.pairs), width)]
    y = linear_axis(0, max(*bars, 1) * 1.08, 3)
    return {
        "y": y,
        "bars": [
            {"height": y.at(count), "count": count, "timestep": found.timesteps[i * width]}
            for i, count in enumerate(bars)
        ],
        "width": width,
        "clean_half": sum(found.pairs[len(found.pairs) // 2 :]) / max(sum(found.pairs), 1),
        "total": sum(found.pairs),
        "ends": (short(found.timesteps[0]), short(found.timesteps[-1])),
    }


def rug(values: Sequence[float]) -> Row | None:
    """Where each value lies between the least and the largest."""
    if len(values) < 2:
        return None
    axis = linear_axis(min(values), max(values))
    return {"low": min(values), "high": max(values), "marks": [axis.at(value) for value in sorted(values)]}


def error_scale(found: ErrorMap) -> tuple[float, float]:
    """Ends of the logarithmic colour scale: 1 % of the errors lie below, the largest is its end."""
    values = sorted(e for row in found.errors for e in row if e)
    if not values:
        return 1e-3, 1e-2
    low, high = values[len(values) // 100], values[-1]
    return low, max(high, low * 1.5)


def block_groups(layers: Sequence[str]) -> list[Row]:
    """Neighbouring layers of one block, for the heat map's margin: name, first row and number of rows.

    >>> [(g["name"], g["first"], g["rows"]) for g in block_groups(["up_blocks.0.a", "up_blocks.0.b", "mid_block.c"])]
    [('up 0', 0, 2), ('mid', 2, 1)]
    """
    groups, first = [], 0
    for name, members in groupby(layers, key=_block):
        rows = len(list(members))
        groups.append({"name": name, "first": first, "rows": rows})
        first += rows
    return groups


def _block(layer: str) -> str:
    parts = layer.split(".")
    name = parts[0].removesuffix("_blocks").removesuffix("_block").replace("_", " ")
    return f"{name} {parts[1]}" if len(parts) > 2 and parts[1].isdigit() else name


def mean_errors(found: ErrorMap, count: int = 10) -> list[Row]:
    """The worst layers: mean error over the steps, and the step at which it is largest."""
    rows = []
    for index in found.worst[:count]:
        seen = [(e, t) for e, t in zip(found.errors[index], found.timesteps, strict=True) if e is not None]
        if seen:
            mean, (largest, at) = sum(e for e, _ in seen) / len(seen), max(seen)
            rows.append({"layer": found.layers[index], "mean": mean, "largest": largest, "at": at})
    return rows


def kernels(audit: Sequence[Row]) -> list[tuple[str, int]]:
    """Kernel and precision, and how many layers ran there, the most first; "x 2" where a layer takes two of them."""

    def name(row: Row) -> str:
        return f"{row['kernel']} ({row['precision']}){' x 2' if row.get('kernels', 1) > 1 else ''}"

    return Counter(map(name, audit)).most_common()


def ends(value: Interval | Any) -> tuple[float, float]:
    """The interval's ends, the value itself where it has none."""
    return (
        value.value if value.low is None else value.low,
        value.value if value.high is None else value.high,
    )

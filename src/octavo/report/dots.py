"""Dots with their intervals, a row each, on one axis on which further right is better."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from octavo.report.charts import Axis, linear_axis, log_axis
from octavo.report.data import Row

WIDE = 20.0
"""Figures of which less is better are drawn logarithmically where the largest is so many times the least."""
PADDING = 0.06

Figures = Sequence[Mapping[str, Any]]


def dot_axis(figures: Figures, better: str) -> Axis:
    """An axis for finite figures (JSON: value, low, high, values); `better` is "higher" or "lower".

    Every value is on it. Intervals and single seeds are too, as far as they reach no further beyond the outermost
    values than these are apart: one interval of two seeds would else press all dots together.
    """
    values = [figure["value"] for figure in figures]
    log = better == "lower" and min(values) > 0 and max(values) > WIDE * min(values)
    to, back = (math.log, math.exp) if log else (float, float)
    low, high = to(min(values)), to(max(values))
    others = [end for figure in figures for end in _others(figure)]
    reach = high - low or max((abs(end - values[0]) for end in others), default=0.0) or abs(low) / 10 or 1.0
    beyond = [to(end) if end > 0 or not log else -math.inf for end in others]
    first = max(min([low, *beyond]), low - reach)
    last = min(max([high, *beyond]), high + reach)
    room = PADDING * (last - first)
    make = log_axis if log else linear_axis
    return replace(make(back(first - room), back(last + room)), reverse=better == "lower")


def dot(figure: Mapping[str, Any], axis: Axis) -> Row:
    """Where the value, its interval and the single seeds lie, in percent of the axis.

    `cut`: the ends of the interval that lie beyond the axis, "left" and "right".
    """
    found: Row = {"at": axis.at(figure["value"]), "seeds": [], "cut": []}
    low, high = figure.get("low"), figure.get("high")
    if low is not None and high is not None:
        left, right = sorted((axis.at(low), axis.at(high)))
        sides = ("right", "left") if axis.reverse else ("left", "right")
        found |= {"left": left, "width": round(right - left, 2)}
        found["cut"] = [
            side for side, cut in zip(sides, (low < axis.low, high > axis.high), strict=True) if cut
        ]
    seeds = figure.get("values", [])
    if len(seeds) > 1:
        found["seeds"] = [axis.at(value) for value in seeds if axis.low <= value <= axis.high]
    return found


def _others(figure: Mapping[str, Any]) -> list[float]:
    ends = [figure[end] for end in ("low", "high") if figure.get(end) is not None]
    return [*ends, *figure.get("values", [])]

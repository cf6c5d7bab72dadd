"""Where a dot and its interval are drawn."""

from __future__ import annotations

import pytest

from octavo.report.dots import dot, dot_axis


def figure(
    value: float, low: float | None = None, high: float | None = None, *seeds: float
) -> dict[str, object]:
    return {"value": value, "low": low, "high": high, "values": list(seeds or (value,))}


def test_further_right_is_better() -> None:
    figures = [figure(30.0), figure(40.0)]
    higher, lower = dot_axis(figures, "higher"), dot_axis(figures, "lower")
    assert higher.at(40.0) > higher.at(30.0) and lower.at(40.0) < lower.at(30.0)
    assert lower.at(30.0) == pytest.approx(100 - higher.at(30.0))


def test_figures_far_apart_are_logarithmic_where_less_is_better() -> None:
    wide = [figure(0.1), figure(1.0), figure(10.0)]
    axis = dot_axis(wide, "lower")
    assert axis.log and axis.at(0.1) - axis.at(1.0) == pytest.approx(axis.at(1.0) - axis.at(10.0), abs=0.02)
    assert not dot_axis(wide, "higher").log
    assert not dot_axis([figure(-0.1), figure(10.0)], "lower").log, "a distance without bias may fall below 0"


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_one_wide_interval_does_not_press_the_dots_together(better: str) -> None:
    """Two seeds have an interval of 12.7 standard errors to either side."""
    figures = [figure(30.0, 29.5, 30.5), figure(31.0, -100.0, 162.0, 20.5, 41.5)]
    axis = dot_axis(figures, better)
    first, second = (dot(one, axis) for one in figures)
    assert abs(first["at"] - second["at"]) > 25
    assert sorted(second["cut"]) == ["left", "right"] and first["cut"] == []
    assert (second["left"], second["left"] + second["width"]) == (0, 100) and second["seeds"] == []


def test_the_end_that_is_cut_is_the_one_that_is_beyond() -> None:
    figures = [figure(30.0), figure(31.0, 30.5, 90.0)]
    assert dot(figures[1], dot_axis(figures, "higher"))["cut"] == ["right"]
    assert dot(figures[1], dot_axis(figures, "lower"))["cut"] == ["left"]


def test_single_seeds_are_drawn_and_one_alone_is_its_own_mean() -> None:
    figures = [figure(2.0, 1.0, 3.0, 1.5, 2.5), figure(4.0)]
    axis = dot_axis(figures, "higher")
    two, one = (dot(each, axis) for each in figures)
    assert two["seeds"] == [axis.at(1.5), axis.at(2.5)] and two["left"] < two["seeds"][0] < two["at"]
    assert one["seeds"] == [] and "width" not in one


@pytest.mark.parametrize("value", [0.0, -3.0, 5.0, 1e-9])
def test_one_figure_alone_has_an_axis_too(value: float) -> None:
    for better in ("higher", "lower"):
        axis = dot_axis([figure(value)], better)
        assert axis.at(value) == pytest.approx(50) and axis.ticks

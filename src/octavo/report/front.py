"""The Pareto front of `octavo tune` as one SVG: quality against images per second, further up and right is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from octavo.errors import OctavoError
from octavo.files import atomic_path
from octavo.places import check_file_place
from octavo.report.charts import Axis, linear_axis, log_axis
from octavo.report.data import Row
from octavo.report.dots import WIDE
from octavo.study.tune_report import choice_name

WIDTH, HEIGHT = 680, 400
LEFT, RIGHT, TOP, BOTTOM = 60, 110, 20, 46
NAMES = {"fd": "FD, less is better", "psnr": "PSNR, dB"}
STYLE = """.front { font: 13px system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif;
  color: light-dark(#1c1b19, #e8e5de);
  color-scheme: light dark; fill: currentColor; }
.front .rule { stroke: light-dark(#dfdbd2, #313237); fill: none; }
.front .soft { fill: light-dark(#66625a, #a09b91); }
.front .tried { fill: light-dark(#b5b0a5, #5c5a55); }
.front .line { stroke: light-dark(#b34a00, #f2a14a); stroke-width: 1.5; fill: none; }
.front .best { fill: light-dark(#b34a00, #f2a14a); }
.front .ring { stroke: light-dark(#b34a00, #f2a14a); stroke-width: 1.5; fill: none; }
.front .asked { stroke: light-dark(#66625a, #a09b91); stroke-dasharray: 4 3; }
.front .full { fill: light-dark(#0067a3, #69b4e8); }"""


def front_svg(results: Mapping[str, Any]) -> str:
    """The picture of what `octavo.study.tune.tune` returns; it asks for nothing and follows light and dark.

    Every choice that was scored is a dot, those that no other beats are joined, the winner has a ring; the dashed line
    is what was asked for; full precision is there if it was scored. Raises `OctavoError` for anything else.
    """
    try:
        return _svg(results)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise OctavoError(f"tune.json: is not what octavo tune writes ({error!r}); run it again") from error


def save_front(results: Mapping[str, Any], out: Path) -> None:
    """Write the picture, whole or not at all."""
    check_file_place(out)
    text = front_svg(results)
    with atomic_path(out) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _svg(results: Mapping[str, Any]) -> str:
    metric, rows, front = results["metric"], results["scored"], results["front"]
    reference, winner = results["reference"], results["winner"]
    x, y = _axes(results)

    def place(row: Mapping[str, Any]) -> tuple[float, float]:
        across = x.at(row["images_per_second"]) / 100 * (WIDTH - LEFT - RIGHT)
        return round(LEFT + across, 1), _down(y, row[metric])

    parts = [_grid(x, y, NAMES[metric]), _asked(results, x, y)]
    parts += [_dot(place(row), 3, "tried", choice_name(row), row, metric) for row in rows]
    parts.append(f'<polyline class="line" points="{" ".join(f"{a},{b}" for a, b in map(place, front))}"/>')
    for row in front:
        parts.append(_dot(place(row), 4, "best", choice_name(row), row, metric))
    a, b = place(winner)
    parts.append(f'<circle class="ring" cx="{a}" cy="{b}" r="8"/>')
    parts.append(_label(a + 10, b - 9, f"{winner['steps']} steps, {winner['solver']}", ""))
    if reference is not None:
        a, b = place(reference)
        parts.append(_dot((a, b), 4, "full", "full precision", reference, metric))
        parts.append(_label(a + 8, b - 6, f"fp32, {reference['steps']} steps", "soft"))
    told = f"{len(rows)} choices scored, {len(front)} on the front; the winner: {choice_name(winner)}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="front" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(told)}"><style>{STYLE}</style>\n'
        + "\n".join(filter(None, parts))
        + "\n</svg>\n"
    )


def _axes(results: Mapping[str, Any]) -> tuple[Axis, Axis]:
    metric = results["metric"]
    rows = [*results["scored"], *([results["reference"]] if results["reference"] else [])]
    speeds = [row["images_per_second"] for row in rows]
    values = [row[metric] for row in rows]
    low, high = min(values), max(values)
    if results["goal"]["kind"] == "quality":
        low, high = min(low, results["bar"]), max(high, results["bar"])
    if metric == "fd" and low > 0 and high > WIDE * low:
        y = log_axis(low / 1.2, high * 1.2)
    else:
        room = 0.08 * (high - low or 1)
        y = linear_axis(low - room, high + room)
    return log_axis(min(speeds) / 1.2, max(speeds) * 1.2), replace(y, reverse=metric == "fd")


def _down(y: Axis, value: float) -> float:
    return round(TOP + (100 - y.at(value)) / 100 * (HEIGHT - TOP - BOTTOM), 1)


def _grid(x: Axis, y: Axis, name: str) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for tick in y.labels:
        at = round(TOP + (100 - tick["at"]) / 100 * (bottom - TOP), 1)
        parts.append(f'<path class="rule" d="M{LEFT} {at}H{right}"/>')
        parts.append(_label(LEFT - 8, at + 4, tick["text"], "soft", "end"))
    for tick in x.labels:
        at = round(LEFT + tick["at"] / 100 * (right - LEFT), 1)
        parts.append(f'<path class="rule" d="M{at} {bottom}v5"/>')
        parts.append(_label(at, bottom + 19, tick["text"], "soft", "middle"))
    parts.append(f'<path class="rule" d="M{LEFT} {bottom}H{right}"/>')
    parts.append(_label(LEFT, TOP - 7, name, "soft"))
    parts.append(_label(right, HEIGHT - 8, "images a second", "soft", "end"))
    return "\n".join(parts)


def _asked(results: Mapping[str, Any], x: Axis, y: Axis) -> str:
    if results["goal"]["kind"] == "quality":
        return f'<path class="asked" d="M{LEFT} {_down(y, results["bar"])}H{WIDTH - RIGHT}"/>'
    at = round(LEFT + x.at(1 / results["bar"]) / 100 * (WIDTH - LEFT - RIGHT), 1)
    return f'<path class="asked" d="M{at} {TOP}V{HEIGHT - BOTTOM}"/>'


def _dot(at: tuple[float, float], radius: int, kind: str, name: str, row: Row | Any, metric: str) -> str:
    told = f"{name}: {metric.upper()} {row[metric]:.4g}, {row['images_per_second']:.3g} images a second"
    return f'<circle class="{kind}" cx="{at[0]}" cy="{at[1]}" r="{radius}"><title>{escape(told)}</title></circle>'


def _label(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'

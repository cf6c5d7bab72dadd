from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from octavo.errors import OctavoError
from octavo.report import ReportData, front_svg, save_front, to_html


def row(steps: int, speed: float, fd: float, recipe: str = "best") -> dict[str, Any]:
    return {
        "recipe": recipe,
        "solver": "ddim",
        "spacing": "dp",
        "steps": steps,
        "seconds": 1 / speed,
        "images_per_second": speed,
        "fd": fd,
    }


@pytest.fixture
def results() -> dict[str, Any]:
    """As `octavo.study.tune.tune` returns them, made up."""
    scored = [row(5, 20.0, 14.0), row(10, 10.0, 6.5), row(10, 5.0, 7.0, "float"), row(20, 5.0, 6.0)]
    estimate = {"value": 6.1, "low": 5.0, "high": 7.2, "method": ""}
    return {
        "goal": {"kind": "quality", "value": None},
        "bar": 6.6,
        "metric": "fd",
        "num_images": 64,
        "winner": {**scored[1], "timesteps": [900, 400, 10]},
        "front": [scored[0], scored[1], scored[3]],
        "scored": scored,
        "reference": {"steps": 100, "images_per_second": 0.5, "fd": 6.6},
        "verification": {
            "num_images": 128,
            "fd": estimate,
            "fd_reference": estimate,
            "difference": estimate,
            "reference_steps": 100,
        },
    }


def circles(text: str, kind: str) -> list[tuple[float, float]]:
    tree = ElementTree.fromstring(text)
    found = tree.iter("{http://www.w3.org/2000/svg}circle")
    return [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in found if c.get("class") == kind]


def test_faster_is_further_right_and_better_is_higher(results: dict[str, Any]) -> None:
    text = front_svg(results)
    five, ten, twenty = circles(text, "best")
    assert five[0] > ten[0] > twenty[0] and five[1] > ten[1] > twenty[1]
    assert circles(text, "ring") == [ten] and len(circles(text, "tried")) == 4
    ((x, y),) = circles(text, "full")
    asked = re.search(r'class="asked" d="M\d+ ([\d.]+)H', text)
    assert x < twenty[0] and asked is not None and float(asked[1]) == y, "the reference's FD was asked for"


def test_more_decibels_are_higher_and_a_time_is_a_vertical_line(results: dict[str, Any]) -> None:
    rows = [{**r, "psnr": 20.0 + r["steps"]} for r in results["scored"]]
    own = {"metric": "psnr", "goal": {"kind": "latency", "value": 0.1}, "bar": 0.1, "reference": None}
    text = front_svg({**results, **own, "scored": rows, "front": rows[:2], "winner": rows[1]})
    five, ten = circles(text, "best")
    assert five[1] > ten[1]
    asked = re.search(r'class="asked" d="M([\d.]+) [\d.]+V', text)
    assert asked is not None and float(asked[1]) == ten[0], "ten images a second"
    assert circles(text, "full") == []


def test_one_choice_alone_is_drawn(results: dict[str, Any]) -> None:
    one = results["scored"][:1]
    text = front_svg(
        {**results, "scored": one, "front": one, "winner": one[0], "reference": None, "bar": 14.0}
    )
    assert len(circles(text, "best")) == 1


def test_names_cannot_become_markup(results: dict[str, Any]) -> None:
    evil = row(5, 20.0, 14.0, recipe='"><script>alert(1)</script>')
    text = front_svg({**results, "scored": [evil], "front": [evil]})
    assert "<script" not in text
    ElementTree.fromstring(text)


def test_the_page_and_the_file_hold_the_picture(results: dict[str, Any], tmp_path: Path) -> None:
    page = to_html(ReportData("tuned", {}, tuning=results))
    assert "What was chosen for tuned" in page and '<section id="tuning"' in page
    assert "best, ddim, dp, 10 steps" in page and "900 400 10" in page and "On 128 other images" in page
    assert (
        "Not excluded at 97.5 %: an FD above full precision" in page and "by up to 7.2, 118 % of that" in page
    )
    save_front(results, tmp_path / "front.svg")
    assert (tmp_path / "front.svg").read_text() == front_svg(results)


@pytest.mark.parametrize("broken", [{}, {"metric": "fd"}, [], {"metric": "speed"}])
def test_what_octavo_tune_did_not_write_is_told(broken: Any) -> None:
    with pytest.raises(OctavoError, match=r"tune\.json: is not what octavo tune writes"):
        front_svg(broken)

"""What the page shows of a study, from the JSON that `octavo study` writes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from octavo.errors import OctavoError
from octavo.files import write_json
from octavo.report import ReportData, to_html
from octavo.report.study_tables import read_study, study_tables


@pytest.fixture(scope="module")
def shown(study: dict[str, Any]) -> dict[str, Any]:
    return study_tables(study)


def table(shown: dict[str, Any], name: str) -> dict[str, Any]:
    return next(found for found in shown["tables"] if found["id"] == name)


def test_every_table_has_a_place_of_its_own(shown: dict[str, Any]) -> None:
    assert [found["id"] for found in shown["tables"]] == [f"T{k}-W8A8" for k in range(1, 6)] + ["T4-W8A6"]
    assert "27 of 90 cells measured in 1.5 hours" in shown["facts"] and not shown["finished"]


def test_a_row_is_a_dot_in_each_chart(shown: dict[str, Any]) -> None:
    rows = {row["label"]: row for row in table(shown, "T4-W8A8")["rows"]}
    base = rows["L_2.4 (the paper's MSE)"]
    assert (
        base["base"]
        and base["dots"]["against"]["at"] == table(shown, "T4-W8A8")["charts"]["against"]["base_at"]
    )
    assert rows["L1"]["figures"]["against"]["value"] == pytest.approx(-4.0)
    assert (
        rows["L1"]["dots"]["psnr"]["at"]
        < base["dots"]["psnr"]["at"]
        < rows["min-max, no search"]["dots"]["psnr"]["at"]
    )
    assert rows["L1"]["dots"]["fd"]["at"] < base["dots"]["fd"]["at"], "the lower distance is further right"
    assert len(base["dots"]["psnr"]["seeds"]) == 3
    assert rows["full precision"]["reference"] and rows["full precision"]["dots"]["fd_real"]


def test_what_is_missing_is_told(shown: dict[str, Any]) -> None:
    rows = {row["label"]: row for row in table(shown, "T4-W8A8")["rows"]}
    assert (
        rows["KL divergence"]["told"] == "not yet measured" and rows["KL divergence"]["dots"]["psnr"] is None
    )
    assert rows["cosine distance"]["endless"] == ["fd"] and rows["cosine distance"]["dots"]["fd"] is None
    sigma = next(row for row in table(shown, "T1-W8A8")["rows"] if row["label"] == "Sigma alone")
    assert sigma["told"] == "does not apply: this network predicts no variance"
    assert not table(shown, "T4-W8A6")["measured"]


def test_a_study_that_has_fewer_seeds_so_far_says_so(study: dict[str, Any]) -> None:
    more = {**study, "options": {**study["options"], "seeds": 5}}
    row = table(study_tables(more), "T2-W8A8")["rows"][-1]
    assert row["so_far"] == "3 of 5 seeds"
    assert table(study_tables(study), "T2-W8A8")["rows"][-1]["so_far"] == ""


def test_the_papers_figures_lie_on_one_axis(shown: dict[str, Any]) -> None:
    """Those of T1 hardly differ, those of T4 by a factor of 3; drawn on axes of their own both would look alike."""
    places = {
        name: [row["paper"]["at"] for row in table(shown, name)["rows"] if row["paper"]]
        for name in ("T1-W8A8", "T4-W8A8")
    }
    assert max(places["T1-W8A8"]) - min(places["T1-W8A8"]) < 3
    assert max(places["T4-W8A8"]) - min(places["T4-W8A8"]) > 40


def test_the_page_holds_the_charts_the_table_and_the_activations(study: dict[str, Any]) -> None:
    text = to_html(ReportData("tiny", {}, study=study))
    for told in (
        "not yet measured",
        "not finite",
        "None of the 6 rows is measured yet",
        "The study is not finished",
    ):
        assert told in text
    assert ">octavo study tiny</pre>" in text and "x86_64, 2 threads, torch 2." in text
    assert "7.38 / 100.52 / 63.01" in text and 'href="#T4-W8A6"' in text
    assert "figure 3" in text and 'href="#activations"' in text
    assert 'href="#verdict"' not in text, "there is none"


def test_the_activations_are_read_from_the_file_that_is_named(study: dict[str, Any], tmp_path: Path) -> None:
    layers = study["activation_layers"]
    written = {name: value for name, value in study.items() if name != "activation_layers"}
    path = tmp_path / "study.json"
    write_json(path, {**written, "activations": None})
    assert study_tables(read_study(path))["activations"] is None
    write_json(path, {**written, "activations": "../activations.json"})
    assert study_tables(read_study(path))["activations"] is None, (
        "a study in progress, or one without its files"
    )
    write_json(tmp_path / "activations.json", layers)
    found = study_tables(read_study(path))["activations"]
    assert [one.layer for one, _ in found["ranges"]] == layers["worth_showing"]
    assert (
        found["count"] == len(layers["layers"]) and found["least"][0] <= found["middle"] <= found["most"][0]
    )


def test_other_json_is_refused_in_one_line(study: dict[str, Any]) -> None:
    for part in ("label", "kind", "figures", "paper"):
        broken = copy.deepcopy(study)
        del broken["tables"][0]["rows"][1][part]
        with pytest.raises(OctavoError, match=r"study\.json: is not what octavo study writes"):
            study_tables(broken)
    with pytest.raises(OctavoError, match=r"study\.json"):
        study_tables({**study, "activation_layers": {"layers": []}})

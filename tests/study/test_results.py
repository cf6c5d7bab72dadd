"""Tables from cells that are made up, so that every mean and interval can be told beforehand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from octavo.errors import OctavoError
from octavo.study import StudyOptions
from octavo.study.cells import Cell, CellStore
from octavo.study.markdown import study_markdown
from octavo.study.results import COLUMNS, summary, tables_of
from octavo.study.tables import Row, Table, base_variant

T_2 = 4.302652729911275  # Student's t, 2 degrees of freedom, 97.5 %


def table() -> Table:
    base = base_variant(StudyOptions())
    sampler = base.sampler
    rows = (
        Row("fp", sampler),
        Row("base", sampler, base),
        Row("noise", sampler, replace(base, source="noise")),
        Row("q(x_t | x_0)", sampler, replace(base, source="raw")),
        Row("Sigma", sampler, reason="no variance"),
    )
    return Table("T2", "W8A8", "Calibration source", rows, "base", ("A note.",))


def measured(psnr: float | None) -> dict[str, object]:
    figures = {"psnr": {"value": psnr, "low": None, "high": None, "method": ""}}
    own = {"fd_real": {"value": 6.0, "low": 5.0, "high": 7.0, "method": "jackknife"}}
    return {"how": "int8 (OpenVINO)", "figures": figures, "reference_figures": own}


PSNR = {("denoising", 0): 50.0, ("denoising", 1): 52.0, ("denoising", 2): 51.0}
PSNR |= {("noise", 0): 40.0, ("noise", 1): 43.0, ("noise", 2): 41.0}


def load(cell: Cell) -> dict[str, object] | None:
    value = PSNR.get((cell.variant.source, cell.seed))
    return None if value is None else measured(value)


def test_rows_are_means_over_seeds_with_t_intervals() -> None:
    (found,) = tables_of([table()], 3, load)
    fp, base, noise, raw, sigma = found["rows"]
    assert base["figures"]["psnr"]["value"] == 51.0 and base["figures"]["psnr"]["values"] == [
        50.0,
        52.0,
        51.0,
    ]
    half = T_2 * 1.0 / math.sqrt(3)
    assert base["figures"]["psnr"]["low"] == pytest.approx(51 - half)
    assert base["figures"]["psnr"]["high"] == pytest.approx(51 + half)
    assert [row["kind"] for row in found["rows"]] == [
        "reference",
        "quantized",
        "quantized",
        "pending",
        "not_applicable",
    ]
    assert fp["figures"]["fd_real"]["low"] == 5.0 and sigma["reason"] == "no variance"
    assert raw["seeds"] == 0 and noise["seeds"] == 3 and noise["how"] == ["int8 (OpenVINO)"]


def test_differences_are_taken_seed_by_seed() -> None:
    (found,) = tables_of([table()], 3, load)
    base, noise = found["rows"][1], found["rows"][2]
    assert base["against_base"] == {}
    difference = noise["against_base"]["psnr"]
    assert difference["values"] == [-10.0, -9.0, -10.0]
    spread = math.sqrt(1 / 3) / math.sqrt(3)  # far less than of either row: seeds go together
    assert difference["high"] - difference["value"] == pytest.approx(T_2 * spread)


def test_what_is_not_finite_is_not_averaged() -> None:
    assert summary([None, 3.0])["value"] is None
    assert summary([math.inf, 3.0])["value"] is None
    one = summary([3.0])
    assert one["value"] == 3.0 and one["low"] is None


def test_the_page_has_every_row_and_even_columns() -> None:
    options = StudyOptions(seeds=3)
    study = {
        "model": "tiny",
        "options": options.to_dict(),
        "cells": {"done": 6, "planned": 9, "seconds": 90.0},
        "finished": False,
        "figures": list(COLUMNS),
        "tables": tables_of([table()], 3, load),
    }
    page = study_markdown(study)
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1 and len(lines) == 2 + 5
    assert r"| q(x_t \| x_0) | not yet measured |" in page
    assert "| **base** (base) | 51.0 (48.5 to 53.5) |" in page
    assert "-9.67 (-11.10 to -8.23)" in page
    assert "does not apply: no variance" in page and "Not finished" in page and "13.92" not in page


def test_cells_are_named_by_all_that_decides_them(tmp_path: Path) -> None:
    base = base_variant(StudyOptions())
    store = CellStore(tmp_path, {"model": "a", "num_images": 8})
    cells = [
        Cell(base, 0),
        Cell(base, 1),
        Cell(replace(base, source="raw"), 0),
        Cell(replace(base, network=False), 0),
        Cell(base_variant(StudyOptions(), (4, 8)), 0),
        Cell(base_variant(StudyOptions(samples=64)), 0),
    ]
    paths = {store.path(cell) for cell in cells}
    paths.add(CellStore(tmp_path, {"model": "b", "num_images": 8}).path(cells[0]))
    assert len(paths) == len(cells) + 1
    assert store.load(cells[0]) is None
    store.save(cells[0], measured(3.0))
    assert store.load(cells[0])["figures"]["psnr"]["value"] == 3.0  # type: ignore[index]
    for damage in ("", "[]", '{"figures": 1}'):
        store.path(cells[0]).write_text(damage)
        with pytest.raises(OctavoError, match=r"seed0-\w+\.json"):
            store.load(cells[0])

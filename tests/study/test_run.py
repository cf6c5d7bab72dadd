from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from octavo.calibration import collect, observations, trace
from octavo.errors import OctavoError
from octavo.evaluation.digits import DigitFeatures
from octavo.evaluation.features import extract
from octavo.evaluation.generate import to_uint8
from octavo.evaluation.inception_score import inception_score
from octavo.study import StudyOptions, run_study
from octavo.study.tables import plan_tables
from octavo.study.variants import digest
from octavo.study.workbench import Workbench
from octavo.work import held


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, by_torch: None) -> list[str]:
    """The cells that are measured, in order; the fifth is killed once."""
    seen: list[str] = []
    real = Workbench.measure

    def measure(self: Workbench, cell):  # type: ignore[no-untyped-def]
        seen.append(f"{cell.variant.slug}-{cell.seed}")
        if len(seen) == 5:
            raise KeyboardInterrupt
        return real(self, cell)

    monkeypatch.setattr(Workbench, "measure", measure)
    return seen


def without_seconds(path: Path) -> object:
    found = json.loads(path.read_text())
    del found["cells"]["seconds"]
    return found


def test_a_stopped_study_goes_on_to_the_same_end(  # type: ignore[no-untyped-def]
    pipeline, options, tmp_path: Path, measured: list[str]
) -> None:
    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        run_study(pipeline, stopped, options, progress=False)
    so_far = json.loads((stopped / "study.json").read_text())
    assert so_far["cells"]["done"] == 4 and so_far["cells"]["planned"] == 8 and not so_far["finished"]
    assert "Not finished" in (stopped / "study.md").read_text()
    study = run_study(pipeline, stopped, options, progress=False)
    assert study["finished"] and len(measured) == 5 + 4 and len(set(measured)) == 8
    at_once = tmp_path / "at-once"
    run_study(pipeline, at_once, options, progress=False)
    for name in ("study.json", "activations.json"):
        if name == "study.json":
            assert without_seconds(stopped / name) == without_seconds(at_once / name)
        else:
            assert (stopped / name).read_bytes() == (at_once / name).read_bytes()
    assert not (stopped / "work").exists()
    run_study(pipeline, stopped, options, progress=False)
    assert len(measured) == 5 + 4 + 8  # nothing is measured again


def killed_at(monkeypatch: pytest.MonkeyPatch, place: object, name: str, *times: int) -> list[bool]:
    """Count the calls of a function, and be killed at some of them (from 1 on); the list holds which."""
    calls: list[bool] = []
    real = getattr(place, name)

    def call(*args: object, **kwargs: object) -> object:
        calls.append(len(calls) + 1 in times)
        if calls[-1]:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(place, name, call)
    return calls


def test_a_study_killed_inside_its_cells_comes_to_the_same_bits(  # type: ignore[no-untyped-def]
    pipeline, options, tmp_path: Path, by_torch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While pairs are collected, while they are observed, before anything is sampled, and on pairs made otherwise."""
    options = replace(options, seeds=1, batch_size=2)  # two batches of pairs, in T2's four cells
    at_once, killed = tmp_path / "at-once", tmp_path / "killed"
    whole = run_study(pipeline, at_once, options, progress=False)
    collected = killed_at(monkeypatch, collect, "_capture", 2)
    observed = killed_at(monkeypatch, observations, "evaluate", 2, 5)
    sampled = killed_at(monkeypatch, Workbench, "_sampled", 2)
    for done in (0, 0, 0, 1):
        with pytest.raises(KeyboardInterrupt):
            run_study(pipeline, killed, options, progress=False)
        assert json.loads((killed / "study.json").read_text())["cells"]["done"] == done
    study = run_study(pipeline, killed, options, progress=False)
    assert study["finished"] and study["tables"] == whole["tables"]
    assert collected.count(False) == 2, "no trajectory is run twice"
    assert observed.count(False) == 2 * 4 and sampled.count(False) == 1 + 4
    assert len(list(killed.glob("cells/*.json"))) == 4
    for path in at_once.glob("cells/*.json"):
        ours, theirs = (json.loads((out / "cells" / path.name).read_text()) for out in (killed, at_once))
        assert ours.pop("seconds") and theirs.pop("seconds") and ours == theirs
    for path in [at_once / "activations.json", *at_once.glob("references/*")]:
        assert (killed / path.relative_to(at_once)).read_bytes() == path.read_bytes()
    assert not (killed / "work").exists()


def cells_by_variant(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The cells on disk by what they are of, in the order of their calibration seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in folder.glob("cells/*.json"):
        cell = json.loads(path.read_text())
        found.setdefault(digest(cell["variant"]), []).append(cell)
    return {name: sorted(cells, key=lambda cell: cell["seed"]) for name, cells in found.items()}


def own_score(images: Path) -> float:
    """The inception score of full-precision images on disk, by digits."""
    made = load_file(images)["images"].numpy()
    logits = extract(DigitFeatures(), to_uint8(made)).logits
    assert logits is not None
    return inception_score(logits)


def test_the_tables_hold_what_was_measured(pipeline, options, tmp_path: Path, by_torch: None) -> None:  # type: ignore[no-untyped-def]
    options = replace(options, tables=("T1", "T5"), seeds=2)
    study = run_study(pipeline, tmp_path, options, name="tiny", command="octavo study tiny", progress=False)
    planned = plan_tables(options, pipeline, trace(pipeline))
    cells = cells_by_variant(tmp_path)
    kinds = [row["kind"] for table in study["tables"] for row in table["rows"]]
    assert (kinds.count("quantized"), kinds.count("reference"), kinds.count("not_applicable")) == (7, 3, 1)
    scores = {
        sampler: own_score(next((tmp_path / "references").glob(f"{str(sampler).lower()}-*")))
        for sampler in options.samplers
    }
    assert len(set(scores.values())) == 2
    for table, plan in zip(study["tables"], planned, strict=True):
        for row, meant in zip(table["rows"], plan.rows, strict=True):
            if row["kind"] == "reference":
                score = row["figures"]["inception_score"]["value"]
                assert score == pytest.approx(scores[meant.sampler], rel=1e-6)
            if row["kind"] == "quantized":
                assert meant.variant is not None and row["label"] == meant.label and row["seeds"] == 2
                values = [cell["figures"]["psnr"]["value"] for cell in cells[digest(meant.variant.to_dict())]]
                shown = row["figures"]["psnr"]
                assert shown["values"] == values and values[0] != values[1]
                middle, half = sum(values) / 2, 12.7062 * abs(values[0] - values[1]) / 2  # t(1) s / sqrt(2)
                ends = shown["low"], shown["value"], shown["high"]
                assert ends == pytest.approx((middle - half, middle, middle + half), rel=1e-4)
    page = (tmp_path / "study.md").read_text()
    assert (
        "# Study of tiny" in page
        and "T5 Samplers, W8A8" in page
        and "this network predicts no variance" in page
    )
    layers = json.loads((tmp_path / "activations.json").read_text())
    assert len(layers["layers"]) > 10
    for layer in layers["layers"]:
        widths = [values[-1] - values[0] for values in layer["quantile_values"]]
        assert len(widths) == 4 and layer["drift"] == pytest.approx(max(widths) / min(widths))
    assert set(layers["worth_showing"]) <= {layer["layer"] for layer in layers["layers"]}
    assert f"`{layers['worth_showing'][0]}`" in page


def test_timesteps_and_metrics_are_measured_row_by_row(  # type: ignore[no-untyped-def]
    make_pipeline, options, tmp_path: Path, by_torch: None
) -> None:
    """T3 and T4: every row is calibrated its own way and has all figures; the base that they share is one cell."""
    pipeline = make_pipeline(up="AttnUpBlock2D")  # with less attention two metrics choose the same ranges
    real = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    options = replace(options, tables=("T3", "T4"), seeds=1, single=(0.0,))
    study = run_study(pipeline, tmp_path, options, images=real, progress=False)
    assert study["finished"] and study["cells"]["done"] == 7 + 5 - 1
    page = (tmp_path / "study.md").read_text()
    psnr: dict[str, dict[str, float]] = {}
    for table, count in zip(study["tables"], (7, 5), strict=True):
        reference, *rows = table["rows"]
        assert reference["kind"] == "reference" and {"fd_real", "inception_score"} < set(reference["figures"])
        assert len(rows) == count
        values = psnr[table["name"]] = {row["label"]: row["figures"]["psnr"]["value"] for row in rows}
        for row in rows:
            assert row["kind"] == "quantized" and not row["reason"] and row["how"] == ["simulation (torch)"]
            for name in ("fd", "fd_real", "inception_score", "sfd", "kid", "precision", "recall"):
                assert row["figures"][name]["value"] is not None, (row["label"], name)
                assert row["figures"][name]["low"] is None, "one seed has no interval"
            against = {name: one["value"] for name, one in row["against_base"].items()}
            if row["label"] == table["base"]:
                assert not against
            else:
                assert against["psnr"] == pytest.approx(values[row["label"]] - values[table["base"]])
            (line,) = [line for line in lines_of(page, table["name"]) if row["label"] in line]
            assert f"{values[row['label']]:.1f}" in line
    timesteps, metrics = psnr["T3"], psnr["T4"]
    assert timesteps["NDTC, std 0.5 T"] == metrics["L_2.4 (the paper's MSE)"]
    del metrics["min-max, no search"]  # chooses as L_2.4 does, where only five ranges are tried
    del timesteps["NDTC, std 0.4 T, the script's"]  # draws as std 0.5 T does, of only four steps
    for found in (timesteps, metrics):
        assert len(set(found.values())) == len(found), found
    papers = {row["label"]: row["paper"]["fid"] for row in study["tables"][0]["rows"] if row["paper"]}
    assert papers == {"single t = 0 T": 49.37, "uniform": 26.19, "NDTC, std 0.5 T": 24.26}


def lines_of(page: str, table: str) -> list[str]:
    """The page's lines of one table."""
    (part,) = [part for part in page.split("\n## ") if part.startswith(table)]
    return [line for line in part.splitlines() if line.startswith("|")]


def test_what_cannot_be_studied_is_told_before_anything_is_written(  # type: ignore[no-untyped-def]
    pipeline, quantized, options, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(OctavoError, match="quantized already"):
        run_study(quantized, out, options)
    with pytest.raises(OctavoError, match="uint8"):
        run_study(pipeline, out, options, images=np.zeros((2, 8, 8, 3)))  # type: ignore[arg-type]
    with pytest.raises(OctavoError, match="more steps than"):
        run_study(pipeline, out, replace(options, steps=1001))
    with pytest.raises(OctavoError, match="features: 'digitz'"):
        run_study(pipeline, out, replace(options, features="digitz"))
    with pytest.raises(OctavoError, match="no Inception weights"):  # what fits a picture in colour
        run_study(pipeline, out, replace(options, features="auto"))
    with pytest.raises(OctavoError, match="images: of 3 x 8 x 6"):
        run_study(pipeline, out, options, images=np.zeros((2, 8, 6, 3), dtype=np.uint8))
    assert not out.exists()
    out.write_text("a file")
    with pytest.raises(OctavoError, match="out is not a folder"):
        run_study(pipeline, out, options)


def test_two_studies_in_one_folder_do_not_mix(  # type: ignore[no-untyped-def]
    pipeline, options, tmp_path: Path, measured: list[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_study(pipeline, tmp_path, options, progress=False)
    (work,) = (path for path in (tmp_path / "work").iterdir() if path.is_dir())
    with held(tmp_path / "work", ""), pytest.raises(OctavoError, match="another process writes a study here"):
        run_study(pipeline, tmp_path, replace(options, num_images=9), progress=False)
    with held(work, ""), pytest.raises(OctavoError, match="another process"):
        run_study(pipeline, tmp_path, options, progress=False)
    other = run_study(pipeline, tmp_path, replace(options, batch_size=4, seeds=1), progress=False)
    assert other["finished"] and len(measured) == 5 + 4  # none of the other batch size's cells is taken
    assert list((tmp_path / "work").iterdir()) == [work]


def test_activations_are_those_of_the_base_row(  # type: ignore[no-untyped-def]
    pipeline, options, tmp_path: Path, by_torch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(self: Workbench, cell) -> dict[str, object]:  # type: ignore[no-untyped-def]
        return {"how": "", "figures": {}, "reference_figures": {}, "seconds": {}}

    monkeypatch.setattr(Workbench, "measure", told)
    for steps in (4, 2):
        run_study(pipeline, tmp_path, replace(options, seeds=1, steps=steps), progress=False)
        layers = json.loads((tmp_path / "activations.json").read_text())
        assert layers["sampler"] == f"DDIM-{steps}"


def test_defaults_are_the_whole_study() -> None:
    options = StudyOptions()
    assert options.tables == ("T1", "T2", "T3", "T4", "T5") and options.seeds >= 3
    assert options.low_bits == ((8, 6), (6, 6), (4, 8)) and str(options.samplers[-1]) == "DDPM-1000"
    assert json.loads(json.dumps(options.to_dict())) == options.to_dict()

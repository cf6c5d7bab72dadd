from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from octavo.cli import study as cli
from octavo.errors import OctavoError
from octavo.study import StudyOptions, run_study
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


def test_the_tables_hold_what_was_measured(pipeline, options, tmp_path: Path, by_torch: None) -> None:  # type: ignore[no-untyped-def]
    options = replace(options, tables=("T1", "T5"), seeds=2)
    study = run_study(pipeline, tmp_path, options, name="tiny", command="octavo study tiny", progress=False)
    operations, samplers = study["tables"]
    assert [row["kind"] for row in operations["rows"]].count("quantized") == 5
    for row in (*operations["rows"], *samplers["rows"]):
        if row["kind"] == "quantized":
            assert row["seeds"] == 2 and len(row["figures"]["psnr"]["values"]) == 2
            assert row["figures"]["psnr"]["low"] < row["figures"]["psnr"]["value"]
        if row["kind"] == "reference":
            assert row["figures"]["inception_score"]["value"] > 1
    page = (tmp_path / "study.md").read_text()
    assert (
        "# Study of tiny" in page
        and "T5 Samplers, W8A8" in page
        and "this network predicts no variance" in page
    )
    layers = json.loads((tmp_path / "activations.json").read_text())
    assert len(layers["layers"]) > 10 and all(layer["drift"] >= 1 for layer in layers["layers"])
    assert set(layers["worth_showing"]) <= {layer["layer"] for layer in layers["layers"]}
    assert f"`{layers['worth_showing'][0]}`" in page


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


def test_the_command_measures_and_says_where(  # type: ignore[no-untyped-def]
    pipeline, tmp_path: Path, by_torch: None
) -> None:
    pipeline.save_pretrained(tmp_path / "tiny")
    app = typer.Typer()
    app.command()(cli.command)
    size = {"seeds": 1, "num-images": 8, "steps": 3, "samples": 4, "batch-size": 8, "table": "T2"}
    chosen = [text for name, value in size.items() for text in (f"--{name}", str(value))]
    arguments = [str(tmp_path / "tiny"), "--out", str(tmp_path / "out"), "--quick", "--no-low-bits"]
    arguments += ["--features", "digits", *chosen]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "study.md: 4 cells" in result.output
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "Calibration source" in page and "noise x_T" in page
    study = json.loads((tmp_path / "out/study.json").read_text())
    assert [table["name"] for table in study["tables"]] == ["T2"] and study["finished"]
    again = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(again.stdout)["cells"]["done"] == 4


def test_defaults_are_the_whole_study() -> None:
    options = StudyOptions()
    assert options.tables == ("T1", "T2", "T3", "T4", "T5") and options.seeds >= 3
    assert options.low_bits == ((8, 6), (6, 6), (4, 8)) and str(options.samplers[-1]) == "DDPM-1000"
    assert json.loads(json.dumps(options.to_dict())) == options.to_dict()

"""`octavo report` as a user runs it, on a tiny pipeline folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import run

from octavo.cli.report import find_parts
from octavo.diffusion.samplers import with_scheduler
from octavo.diffusion.trajectories import spaced, with_trajectory
from octavo.errors import OctavoError


def test_a_folder_with_a_model_and_a_study(saved: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "tiny-int8").symlink_to(saved)
    (tmp_path / "both" / "study.json").write_text(json.dumps({"model": "tiny", "tables": []}))
    out = tmp_path / "page.html"
    arguments = ("--num-images", "4", "--steps", "2", "--batch-size", "4", "--runtime", "torch", "--json")
    code, printed, err = run(capsys, "report", tmp_path / "both", "--out", out, *arguments)
    assert code == 0, err
    figures, text = json.loads(printed), out.read_text()
    assert figures["bytes"] == out.stat().st_size and "smaller" in figures["verdict"]
    assert 'id="study"' in text and "from_pretrained(&#34;tiny-int8&#34;)" in text
    assert "No full-precision model was given" in text and "nothing ran on integers" in text


def test_a_study_alone(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "study.json").write_text(json.dumps({"model": "tiny", "tables": []}))
    code, printed, err = run(capsys, "report", tmp_path, "--out", tmp_path / "page.html")
    assert code == 0, err
    assert (
        "needs no network" in printed
        and "<h1>What holds of PTQ4DM on tiny</h1>" in (tmp_path / "page.html").read_text()
    )


def test_what_a_place_holds(saved: Path, tmp_path: Path) -> None:
    assert find_parts("digits") == ("digits", None, None)
    assert find_parts(str(saved)) == (str(saved), None, None)
    with pytest.raises(OctavoError, match=r"neither a pipeline .* nor a tuning"):
        find_parts(str(tmp_path))
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(saved)
    with pytest.raises(OctavoError, match="several pipelines"):
        find_parts(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["SAVED", "--out", "a.pdf"], "a.pdf"),
        (["SAVED", "--out", "/dev/null/a.html"], "/dev/null"),
        (["."], "study.json"),
    ],
)
def test_errors_are_one_line_before_any_work(  # type: ignore[no-untyped-def]
    saved: Path, tmp_path: Path, monkeypatch, capsys, arguments: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "report", *[str(saved) if a == "SAVED" else a for a in arguments])
    assert code == 2 and told in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


# diffusers' DPM-Solver hands a torch tensor to NumPy, of which torch 2.13 and NumPy 2 together warn.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")
def test_a_tuned_folder_is_measured_on_its_own_solver_and_trajectory(  # type: ignore[no-untyped-def]
    pipeline, quantized, tmp_path: Path, capsys
) -> None:
    """The reference's own solver is DDIM; a DDIMPipeline cannot drive the tuned one's."""
    tuned = with_trajectory(
        with_scheduler(quantized, "dpmsolver++"), spaced(quantized.scheduler, "quadratic", 3)
    )
    tuned.save_pretrained(tmp_path / "tuned" / "pipeline")
    pipeline.save_pretrained(tmp_path / "tiny")
    choice = {
        "recipe": "best",
        "solver": "ddim",
        "spacing": "quadratic",
        "steps": 3,
        "images_per_second": 9.0,
    }
    row = {**choice, "fd": 2.0, "seconds": 1 / 9}
    results = {
        "goal": {"kind": "latency", "value": 1.0},
        "bar": 1.0,
        "metric": "fd",
        "num_images": 8,
        "winner": {**row, "timesteps": [90, 40, 10]},
        "front": [row],
        "scored": [row],
        "reference": None,
        "verification": None,
    }
    (tmp_path / "tuned" / "tune.json").write_text(json.dumps(results))
    out = tmp_path / "page.html"
    quick = ("--num-images", "4", "--batch-size", "4", "--runtime", "torch")
    place = tmp_path / "tuned"
    code, _, err = run(capsys, "report", place, "--reference", tmp_path / "tiny", "--out", out, *quick)
    assert code == 0, err
    text = out.read_text()
    assert "Both models sample by" in text and "DPMSolverMultistepTrajectoryScheduler" in text
    assert "3 steps" in text and 'id="tuning"' in text and "best, ddim, quadratic, 3 steps" in text
    code, _, err = run(capsys, "report", place, "--out", out, *quick, "--steps", "5")
    assert code == 2 and "--steps: 5, but the model's trajectory has 3; leave it out" in err
    (tmp_path / "tuned" / "tune.json").write_text("{}")
    code, _, err = run(capsys, "report", place, "--out", out, *quick)
    assert code == 2 and "tune.json: is not what octavo tune writes" in err

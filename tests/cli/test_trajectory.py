"""`octavo trajectory`, and the commands that take what it writes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from diffusers import DDIMPipeline

import octavo

QUICK = ("--candidates", "6", "--num-images", "2", "--batch-size", "2")


@pytest.fixture(scope="module")
def model(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trajectory") / "tiny"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def three_steps(model: Path) -> Path:
    """A trajectory of the model, by hand."""
    file = model.parent / "three.json"
    octavo.Trajectory((900, 400, 100), 1000, "epsilon", "by hand").save(file)
    return file


def test_a_trajectory_is_searched_written_and_sampled(
    model: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "trajectory", str(model), "--steps", "3", *QUICK, "--out", "my steps.json")
    assert code == 0, err
    assert "search: at most 12 evaluations of the network" in err
    found = octavo.Trajectory.load("my steps.json")
    assert found.num_steps == 3 and str(found) in out and "12 evaluations" in out
    told = dict(line.split(": ", 1) for line in out.splitlines() if ": " in line)
    _, *command = shlex.split(told["next"])
    assert "kept" not in out
    code, _, err = run(capsys, *command, "--num-images", "2")
    assert code == 0 and Path("grid.png").is_file(), err
    code, out, err = run(capsys, "trajectory", str(model), "--steps", "2", *QUICK)
    assert code == 0 and "12 evaluations of the network, 12 of them kept from an earlier run" in out, err


def test_the_next_command_samples_by_the_scheduler_that_was_searched_for(
    model: Path, tmp_path: Path, capsys: Any
) -> None:
    arguments = (
        "--steps",
        "3",
        "--method",
        "trailing",
        "--scheduler",
        "ddpm",
        "--out",
        str(tmp_path / "t.json"),
    )
    code, out, err = run(capsys, "trajectory", str(model), *arguments)
    assert code == 0, err
    assert (
        f"next: octavo sample {model} --scheduler ddpm --trajectory {tmp_path}/t.json --out grid.png" in out
    )


def test_json_has_the_whole_trajectory(model: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "t.json"
    arguments = ("--steps", "2", "--method", "grid", "--mantissas", "1", "--objective", "elbo", "--json")
    code, printed, err = run(capsys, "trajectory", str(model), *QUICK, *arguments, "--out", str(out))
    assert code == 0, err
    figures = json.loads(printed)
    assert figures.pop("out") == str(out)
    assert octavo.Trajectory.from_dict(figures) == octavo.Trajectory.load(out)


def test_a_heuristic_is_told_as_one(model: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = (
        "--method",
        "grid",
        "--objective",
        "fd",
        "--mantissas",
        "1",
        "--finalists",
        "2",
        "--steps",
        "2",
    )
    data = (
        "--features",
        "digits",
        "--fd-images",
        "8",
        "--runtime",
        "torch",
        "--out",
        str(tmp_path / "t.json"),
    )
    code, out, err = run(capsys, "trajectory", str(model), *QUICK, *arguments, *data)
    assert code == 0, err
    assert "the best of 2 by FD, of all on the grid screened by trajectory cost, a heuristic" in out


def test_quantize_calibrates_on_it_and_writes_a_pipeline_that_visits_it(
    model: Path, three_steps: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "int8"
    quick = ("--samples", "4", "--recipe", "ptq4dm", "--batch-size", "2")
    code, _, err = run(
        capsys, "quantize", str(model), "--trajectory", str(three_steps), "--out", str(out), *quick
    )
    assert code == 0, err
    loaded = DDIMPipeline.from_pretrained(out)
    assert loaded.scheduler.config.trajectory == [900, 400, 100]
    config = json.loads((out / "unet/config.json").read_text())["quantization_config"]
    assert config["recipe"]["steps"] == 3
    # its own number of steps is the default, another is refused
    code, _, err = run(capsys, "sample", str(out), "--out", str(tmp_path / "a.png"), "--num-images", "1")
    assert code == 0, err
    code, _, err = run(
        capsys, "sample", str(out), "--out", str(tmp_path / "b.png"), "--num-images", "1", "--steps", "50"
    )
    assert code == 2 and err == "octavo: --steps: 50, but the model's trajectory has 3; leave it out"


def test_an_eta_is_kept_in_the_file_and_in_the_folder(
    model: Path, three_steps: Path, tmp_path: Path, capsys: Any
) -> None:
    file, out = tmp_path / "t.json", tmp_path / "int8"
    spaced = ("trajectory", str(model), "--steps", "3", "--method", "trailing", "--out", str(file))
    code, printed, err = run(capsys, *spaced, "--eta", "0.5")
    assert code == 0 and "--eta" not in printed and octavo.Trajectory.load(file).eta == 0.5, err
    code, _, err = run(capsys, "trajectory", str(model), "--steps", "3", *QUICK, "--eta", "0.5")
    assert code == 2 and "eta: the costs that objective trajectory adds up are of DDIM without noise" in err
    quick = ("--samples", "4", "--recipe", "ptq4dm", "--batch-size", "2")
    given = ("--trajectory", str(three_steps), "--eta", "0.25")
    code, printed, err = run(capsys, "quantize", str(model), *given, "--out", str(out), *quick)
    assert code == 0 and "--eta" not in printed, err
    scheduler = DDIMPipeline.from_pretrained(out).scheduler
    assert type(scheduler).__name__ == "DDIMEtaTrajectoryScheduler"
    assert (scheduler.config.eta, scheduler.config.trajectory) == (0.25, [900, 400, 100])


def test_evaluate_samples_both_models_on_it(
    model: Path, three_steps: Path, tmp_path: Path, capsys: Any
) -> None:
    arguments = ("--reference", str(model), "--num-images", "8", "--batch-size", "8", "--no-cost", "--json")
    arguments += ("--features", "digits", "--runtime", "torch", "--trajectory", str(three_steps))
    code, printed, err = run(capsys, "evaluate", str(model), *arguments)
    assert code == 0, err
    figures = json.loads(printed)
    assert figures["steps"] == 3 and figures["trajectory"] == str(three_steps)
    assert figures["scheduler"] == "DDIMTrajectoryScheduler"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--steps", "3", "--method", "magic"), "method: 'magic' is not one of dp, grid, descent"),
        (("--steps", "2000"), "steps: 2000 is not a whole number from 1 to 1000"),
        (("--steps", "3", "--objective", "fd"), "objective: 'fd' is no sum over jumps"),
        (("--steps", "3", "--mantissas", "1;3"), "--mantissas: '1;3' is not a list like 1,3"),
        (("--steps", "3", "--candidates", "2"), "steps: 3 is more than the 2 candidate timesteps"),
        (("--steps", "3", "--scheduler", "PNDMScheduler"), "PNDMScheduler"),
        (("--steps", "3", "--candidates", "2000"), "candidates: 2000 is not a whole number from 2 to 1000"),
        (("--steps", "3", "--seed", "2000000000"), "seed: 2000000000 is not a whole number from 0 to 107374"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    arguments: tuple[str, ...], told: str, model: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "t.json"
    code, printed, err = run(capsys, "trajectory", str(model), "--out", str(out), *arguments)
    assert code == 2 and not printed and told in err and len(err.splitlines()) == 1, err
    assert not out.exists()


def test_a_file_that_is_no_trajectory_and_one_of_another_model_are_told(
    model: Path, tmp_path: Path, capsys: Any
) -> None:
    file = tmp_path / "t.json"
    sample = ("sample", str(model), "--out", str(tmp_path / "a.png"), "--trajectory", str(file))
    code, _, err = run(capsys, *sample)
    assert code == 2 and "t.json: cannot be read" in err
    file.write_text("{}")
    code, _, err = run(capsys, *sample)
    assert code == 2 and "is not one that `octavo trajectory` wrote" in err and "t.json" in err
    octavo.Trajectory((9, 5), 1000, "epsilon", "dp", model="other").save(file)
    code, _, err = run(capsys, *sample)
    assert code == 2 and "t.json: trajectory: was made for another model" in err
    octavo.Trajectory((9, 5), 1000, "sample", "dp").save(file)
    code, _, err = run(capsys, *sample)
    assert code == 2 and "t.json: trajectory: is for a model of prediction type 'sample'" in err
    octavo.Trajectory((9, 5), 1000, "epsilon", "trailing", eta=0.5).save(file)
    code, _, err = run(capsys, *sample, "--scheduler", "ddpm")
    assert code == 2 and "t.json: trajectory: was made with an eta of 0.5" in err and "by ddim" in err
    code, _, err = run(capsys, *sample, "--scheduler", "PNDMScheduler")
    assert code == 2 and "scheduler: PNDMScheduler takes no timesteps of one's choice; ddim, ddpm" in err
    assert not (tmp_path / "a.png").exists()

"""`octavo reuse`, and the commands that take what it writes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from command_line import run

import octavo
from octavo.diffusion.reuse import ReusePlan
from octavo.errors import OctavoError


def test_a_plan_is_made_sampled_with_and_evaluated(
    saved: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quick = ("--steps", "4", "--recompute", "2", "--num-images", "2")
    code, out, err = run(capsys, "reuse", str(saved), *quick, "--scheduler", "ddim")
    assert code == 0 and "--scheduler ddim --reuse" in out, err
    code, out, err = run(capsys, "reuse", str(saved), *quick)
    assert code == 0, err
    plan = ReusePlan.load("reuse.json")
    assert plan.num_steps == 4 and sum(plan.recomputed) == 2 and str(plan) in out and plan.order == 1
    assert "an evaluation of 2: whole" in out
    told = dict(line.split(": ", 1) for line in out.splitlines() if ": " in line)
    _, *command = shlex.split(told["next"])
    for runtime in ("openvino", "torch"):
        code, _, err = run(capsys, *command, "--num-images", "2", "--runtime", runtime)
        assert code == 0 and Path("grid.png").is_file(), err

    evaluate = (
        "evaluate",
        str(saved),
        "--reference",
        str(saved),
        "--num-images",
        "8",
        "--features",
        "digits",
    )
    fast = ("--json", "--reference-runtime", "openvino")
    code, out, err = run(capsys, *evaluate, "--steps", "4", "--reuse", "reuse.json", *fast)
    assert code == 0, err
    figures = json.loads(out)
    assert figures["reuse"] == "reuse.json" and figures["comparison"]["psnr"]["value"] < 60
    ours, theirs = figures["cost"]["model"], figures["cost"]["reference"]
    assert ours["macs"] < theirs["macs"] and ours["bytes"] == theirs["bytes"]
    assert ours["latency"]["ms"] > 0 and ours["peak_memory_bytes"] > ours["libraries_memory_bytes"]


def test_a_plan_for_other_steps_is_refused(saved: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "other.json"
    ReusePlan((900.0, 100.0), (1, 0), 1).save(file)
    code, _, err = run(
        capsys, "sample", str(saved), "--steps", "3", "--reuse", str(file), "--out", str(tmp_path / "a.png")
    )
    assert (
        code == 2 and "other.json: is for 2 timesteps, and this sampler's 3 steps visit 3, 0 of them" in err
    )
    code, _, err = run(
        capsys,
        "sample",
        str(saved),
        "--scheduler",
        "rk45",
        "--reuse",
        str(file),
        "--out",
        str(tmp_path / "a.png"),
    )
    assert code == 2 and "--reuse: rk45 chooses its steps itself" in err


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (("--steps", "10"), "p.json: is for 20 timesteps, and this sampler's 10 steps visit 10, 10 of them"),
        (("--steps", "1"), "p.json: is for 20 timesteps, and this sampler's 1 steps visit 1, 1 of them"),
        (("--steps", "20", "--scheduler", "ddpm"), "is for DDIMScheduler, and this sampler is DDPMScheduler"),
    ],
)
def test_a_plan_that_visits_the_same_timesteps_otherwise_is_refused(
    other: tuple[str, ...], told: str, saved: Path, tmp_path: Path, capsys: Any
) -> None:
    file = tmp_path / "p.json"
    timesteps = tuple(50.0 * k for k in range(19, -1, -1))
    ReusePlan(timesteps, (1, 0) * 10, 1, facts={"solver": "DDIMScheduler"}).save(file)
    options = (
        "--reuse",
        str(file),
        "--num-images",
        "1",
        "--runtime",
        "torch",
        "--out",
        str(tmp_path / "a.png"),
    )
    code, _, err = run(capsys, "sample", str(saved), *options, *other)
    assert code == 2 and told in err and "make a plan with the same --steps" in err


def test_an_image_to_image_run_follows_the_end_of_a_plan(saved: Path, tmp_path: Path) -> None:
    from octavo.checkpoint import load
    from octavo.cli import shared
    from octavo.diffusion.capture import Probe

    file = tmp_path / "p.json"
    plan = ReusePlan((900.0, 600.0, 300.0, 0.0), (1, 0, 1, 0), 1)
    plan.save(file)

    def follow(*timesteps: float, skipped: int) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            probed = Probe(len(timesteps), timesteps, 1, (), skipped)
            patch.setattr("octavo.diffusion.probe", lambda *_, **__: probed)
            return shared.reuse_plan(load(str(saved)), file, 4, {})

    assert follow(600.0, 300.0, 0.0, skipped=1) == plan
    assert follow(900.0, 600.0, 600.0, 300.0, skipped=1) == plan  # twice at a timestep, ended early
    for timesteps in ((600.0, 0.0), (600.0, 300.0, 100.0), (1000.0, 600.0, 300.0)):
        with pytest.raises(OctavoError, match="is for 4 timesteps"):
            follow(*timesteps, skipped=1)


def test_the_next_command_has_the_trajectory(
    saved: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    octavo.Trajectory((901, 701, 401, 1), 1000, "epsilon", "by hand").save("t.json")
    options = ("--trajectory", "t.json", "--recompute", "2", "--num-images", "1", "--runtime", "torch")
    code, out, err = run(capsys, "reuse", str(saved), *options)
    assert code == 0, err
    _, *command = shlex.split(out.rsplit("next: ", 1)[1])
    code, _, err = run(capsys, *command, "--num-images", "1", "--runtime", "torch")
    assert code == 0 and Path("grid.png").is_file(), err


def test_even_steps_are_written(saved: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "r.json"
    options = ("--steps", "6", "--recompute", "2", "--num-images", "1", "--runtime", "torch", "--even")
    code, _, err = run(capsys, "reuse", str(saved), *options, "--out", str(file))
    assert code == 0, err
    assert ReusePlan.load(file).recomputed == (1, 0, 0, 1, 0, 0)


@pytest.mark.parametrize("order", [0, 2])
def test_the_order_is_in_the_plan_and_ages_suffice_for_it(
    order: int, saved: Path, tmp_path: Path, capsys: Any
) -> None:
    """One whole step of 8 serves 7 steps: more than the default age of order 2."""
    file = tmp_path / "r.json"
    options = ("--steps", "8", "--recompute", "1", "--num-images", "1", "--runtime", "torch")
    code, _, err = run(capsys, "reuse", str(saved), *options, "--order", str(order), "--out", str(file))
    assert code == 0, err
    plan = ReusePlan.load(file)
    assert plan.order == order and sum(plan.recomputed) == 1


def test_depth_out_of_range_is_told(saved: Path, tmp_path: Path, capsys: Any) -> None:
    code, _, err = run(capsys, "reuse", str(saved), "--depth", "9", "--out", str(tmp_path / "r.json"))
    assert code == 2 and "depth: 9 is not" in err and not (tmp_path / "r.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--recompute", "9"], "recompute: 9 is not between 1 and 6"),
        (["--recompute", "2", "--max-age", "1", "--order", "0"], "recompute: no plan of 2 whole steps"),
        (
            [
                "--recompute",
                "4",
                "--max-age",
                "1",
                "--order",
                "0",
                "--runtime",
                "torch",
                "--precision",
                "bf16",
            ],
            "--precision: ",
        ),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_measured(
    saved: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.setattr("octavo.runtimes.accelerate", lambda *_, **__: pytest.fail("was accelerated"))
    code, _, err = run(
        capsys, "reuse", str(saved), "--steps", "6", *arguments, "--out", str(tmp_path / "r.json")
    )
    assert code == 2 and said in err and len(err.splitlines()) == 1, err

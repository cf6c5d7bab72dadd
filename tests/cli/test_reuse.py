"""`octavo reuse`, and the commands that take what it writes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from command_line import run

from octavo.diffusion.reuse import ReusePlan


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
    fast = ("--no-cost", "--json", "--reference-runtime", "openvino")
    code, out, err = run(capsys, *evaluate, "--steps", "4", "--reuse", "reuse.json", *fast)
    assert code == 0, err
    figures = json.loads(out)
    assert figures["reuse"] == "reuse.json" and figures["comparison"]["psnr"]["value"] < 60


def test_a_plan_for_other_steps_is_refused(saved: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "other.json"
    ReusePlan((900.0, 100.0), (1, 0), 1).save(file)
    code, _, err = run(
        capsys, "sample", str(saved), "--steps", "3", "--reuse", str(file), "--out", str(tmp_path / "a.png")
    )
    assert code == 2 and "other.json: is for 2 other timesteps than this sampler's 3 steps visit" in err
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

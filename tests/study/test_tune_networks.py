from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.diffusion.trajectories import Trajectory
from octavo.evaluation.trajectory_methods import SearchOptions
from octavo.quantization import ranges
from octavo.study import tune_networks
from octavo.study.tune_networks import Networks, make_networks
from octavo.study.tune_search import Curve

# diffusers' DEIS hands a torch tensor to NumPy, of which torch 2.13 and NumPy 2 together warn.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]
QUICK: dict[str, Any] = {"samples": 2, "steps": 2}


@pytest.fixture(autouse=True)
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled, which for so small a network is quicker; ranges are searched coarsely."""
    monkeypatch.setattr(tune_networks, "accelerate", lambda pipeline, **settings: pipeline)
    monkeypatch.setattr(tune_networks, "ROUNDS", 1)
    monkeypatch.setattr(ranges, "CANDIDATES", 5)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is calibrated and timed, as it happens."""
    done: list[str] = []
    for name in ("calibrate", "take_turns"):
        real = getattr(tune_networks, name)
        monkeypatch.setattr(
            tune_networks,
            name,
            lambda *args, name=name, real=real, **more: done.append(name) or real(*args, **more),
        )
    return done


def networks(pipeline: Any, folder: Path, recipe: str = "ptq4dm", **changes: Any) -> Networks:
    settings = {"calibration": QUICK, "seed": 0, "batch_size": 2, "inputs": None, **changes}
    return make_networks(pipeline, (recipe,), folder, search=SearchOptions(), progress=False, **settings)


def test_another_model_or_calibration_in_the_same_folder_is_quantized_anew(
    make_pipeline: Callable[..., Any], pipeline: Any, tmp_path: Path, made: list[str]
) -> None:
    networks(pipeline, tmp_path)
    other = make_pipeline(seed=7)
    again = networks(other, tmp_path)
    assert torch.equal(again.plain["ptq4dm"].unet.conv_in.bias, other.unet.conv_in.bias)
    networks(pipeline, tmp_path, calibration={"samples": 3, "steps": 2})
    assert made.count("calibrate") == 3
    before = [*made]
    networks(other, tmp_path)
    assert made == before, "what is known is not made again"


def test_times_are_those_of_the_batch_size_and_the_threads(
    pipeline: Any, tmp_path: Path, made: list[str]
) -> None:
    for settings in ({}, {"batch_size": 1}, {}, {"batch_size": 1}):
        networks(pipeline, tmp_path, "float", **settings)
    assert made == ["take_turns"] * 2
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        networks(pipeline, tmp_path, "float")
    finally:
        torch.set_num_threads(threads)
    assert made == ["take_turns"] * 3


def test_timesteps_are_searched_from_the_seed_once_for_all_solvers(
    pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[tuple[int, int]] = []

    def search(pipeline: Any, steps: int, *, seed: int, **settings: Any) -> Trajectory:
        searched.append((steps, seed))
        return Trajectory((900, 0), 1000, "epsilon", "dp", network_evaluations=12)

    monkeypatch.setattr(tune_networks, "search_trajectory", search)
    made = networks(pipeline, tmp_path, "float", seed=5)
    for solver in ("ddim", "unipc", "ddim"):
        made.trajectory(Curve("float", solver, "dp"), 2)
    assert searched == [(2, 5)] and made.spending.counts["search"] == 12
    made.trajectory(Curve("float", "deis", "dp"), 2)
    assert searched == [(2, 5)] * 2, "which may not end at 0"


def test_searched_timesteps_that_a_solver_cannot_visit_are_left_out_with_the_reason(
    pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = networks(pipeline, tmp_path, "float")
    monkeypatch.setattr(made, "trajectory", lambda curve, steps: Trajectory((9, 0), 1000, "epsilon", "dp"))
    assert made.curve(Curve("float", "deis", "dp"), {2: 2}) == []
    assert [choice.steps for choice in made.curve(Curve("float", "ddim", "dp"), {2: 2})] == [2]
    (line,) = made.left_out
    assert line.startswith("float, deis, dp, 2 steps: ") and "timestep 0" in line

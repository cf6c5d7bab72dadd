from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from octavo.diffusion.trajectories import Trajectory
from octavo.errors import OctavoError

TRAJECTORY = Trajectory(
    (999, 400, 0), 1000, "epsilon", "dp", "elbo", 8000, 3, "ab12", {"candidates": 100}, (0.9999, 0.5, 0.0)
)


def test_a_file_gives_back_the_trajectory(tmp_path: Path) -> None:
    path = tmp_path / "new" / "trajectory.json"
    TRAJECTORY.save(path)
    assert Trajectory.load(path) == TRAJECTORY
    assert isinstance(Trajectory.load(path).timesteps, tuple)


def test_a_file_from_before_the_schedule_was_kept_loads() -> None:
    state = {key: value for key, value in TRAJECTORY.to_dict().items() if key != "alpha_bars"}
    assert Trajectory.from_dict(state).alpha_bars is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"timesteps": []}, "not a list of at least one timestep"),
        ({"timesteps": "999"}, "not a list of at least one timestep"),
        ({"timesteps": [999, 400.0]}, "timestep 400.0 is not a whole number from 0 to 999"),
        ({"timesteps": [True]}, "timestep True is not a whole number"),
        ({"timesteps": [1000, 0]}, "timestep 1000 is not a whole number from 0 to 999"),
        ({"timesteps": [5, -1]}, "timestep -1 is not a whole number"),
        ({"timesteps": [5, 5]}, "do not descend (5 follows 5)"),
        ({"timesteps": [5, 7]}, "do not descend (7 follows 5)"),
        ({"timesteps": [["9" * 5000]]}, "is not a whole number"),
        ({"num_train_timesteps": 0}, "num_train_timesteps '0' is not a whole number from 1"),
        ({"num_train_timesteps": 1e3}, "num_train_timesteps '1000.0' is not a whole number"),
        ({"prediction_type": "flow"}, "prediction_type 'flow' is not one of epsilon, v_prediction, sample"),
        ({"prediction_type": ["epsilon"]}, "prediction_type ['epsilon'] is not one of"),
        ({"method": ""}, "method is not a short text"),
        ({"model": 3}, "model is not a short text"),
        ({"seed": -1}, "seed '-1' is not a whole number from 0"),
        ({"network_evaluations": None}, "network_evaluations 'None' is not a whole number"),
        ({"facts": []}, "facts are not a JSON object"),
        ({"alpha_bars": [0.5, "0"]}, "alpha_bars are not a list of numbers from 0 to 1"),
        ({"alpha_bars": [float("nan")]}, "alpha_bars are not a list of numbers from 0 to 1"),
        ({"alpha_bars": []}, "alpha_bars are not a list of numbers from 0 to 1"),
        ({"version": 2}, "version 2 is not 1; upgrade octavo"),
        ({"version": True}, "version True is not 1"),
        ({"format": "other"}, "is not one that `octavo trajectory` wrote"),
        ({"surprise": 1}, "unknown field 'surprise'; upgrade octavo"),
    ],
)
def test_hostile_files_are_told_in_one_line(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    path = tmp_path / "trajectory.json"
    path.write_text(json.dumps({**TRAJECTORY.to_dict(), **change}))
    with pytest.raises(OctavoError) as error:
        Trajectory.load(path)
    assert told in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("missing", ["timesteps", "num_train_timesteps", "prediction_type", "method"])
def test_a_missing_field_is_named(missing: str) -> None:
    state = {key: value for key, value in TRAJECTORY.to_dict().items() if key != missing}
    with pytest.raises(OctavoError, match=f"{missing} is missing"):
        Trajectory.from_dict(state)


@pytest.mark.parametrize("text", ["[]", "3", "null", '{"a": ', ""])
def test_what_is_no_trajectory_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trajectory.json"
    path.write_text(text)
    with pytest.raises(OctavoError, match=r"trajectory\.json"):
        Trajectory.load(path)

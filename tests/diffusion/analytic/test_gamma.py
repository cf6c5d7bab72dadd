from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo.diffusion.analytic import Gamma
from octavo.diffusion.analytic.gamma import interpolated
from octavo.errors import OctavoError
from octavo.files import write_json

GAMMA = Gamma(
    (0, 10, 99),
    (0.5, 0.9, 1.0),
    (0.01, 0.02, 0.0),
    100,
    "epsilon",
    16,
    64,
    7,
    "m",
    "n",
    {"runtime": ["x"]},
    (0.9, 0.1),
)
ALPHA_BARS = np.cumprod(1 - np.linspace(1e-4, 0.1, 100))


def exact(variance: float) -> np.ndarray:
    """Gamma of normal data of that variance: E eps^2 where eps = sqrt(1 - abar) x_t / Var(x_t)."""
    return (1 - ALPHA_BARS) / (ALPHA_BARS * variance + 1 - ALPHA_BARS)


def test_it_is_saved_and_loaded_whole(tmp_path: Path) -> None:
    GAMMA.save(tmp_path / "gamma.json")
    assert Gamma.load(tmp_path / "gamma.json") == GAMMA
    assert [path.name for path in tmp_path.iterdir()] == ["gamma.json"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"format": "else"}, "is not one that Octavo estimated"),
        ({"version": 2}, "version 2 is not 1"),
        ({"more": 1}, "unknown field 'more'"),
        ({"values": [0.5, 0.9]}, "has 2 values for 3 timesteps"),
        ({"values": [0.5, 0.9, "1"]}, "'1' is not a finite number"),
        ({"timesteps": [10, 0, 99]}, "timesteps do not descend"),
        ({"timesteps": [0, 10, 100]}, "100 is not a whole number from 0 to 99"),
        ({"errors": None}, "errors are not a list"),
        ({"prediction_type": "score"}, "prediction_type is not one of epsilon"),
        ({"images": -1}, "images '-1' is not a whole number"),
        ({"network": 3}, "network is not a short text"),
        ({"alpha_bars": [2.0]}, "alpha_bars are not a list of numbers from 0 to 1"),
        ({"facts": []}, "facts are not a JSON object"),
    ],
)
def test_a_file_that_is_no_table_is_named(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    file = tmp_path / "gamma.json"
    write_json(file, {**GAMMA.to_dict(), **changes})
    with pytest.raises(OctavoError) as error:
        Gamma.load(file)
    assert str(error.value).startswith(f"{file}: ") and told in str(error.value)


def test_a_field_that_is_missing_is_named(tmp_path: Path) -> None:
    state = GAMMA.to_dict()
    del state["errors"]
    with pytest.raises(OctavoError, match="errors is missing; estimate it again"):
        Gamma.from_dict(state)


def test_between_and_beyond_its_timesteps_it_is_that_of_normal_data() -> None:
    known = [5, 30, 80]
    found = interpolated(known, exact(0.3)[known], range(100), ALPHA_BARS)
    np.testing.assert_allclose(found, exact(0.3), rtol=1e-9)


def test_at_its_timesteps_it_is_the_value_even_out_of_range() -> None:
    gamma = replace(GAMMA, values=(-0.1, 0.9, 1.2))
    assert gamma.at([99, 10, 0], ALPHA_BARS).tolist() == [1.2, 0.9, -0.1]
    between = gamma.at(range(11, 99), ALPHA_BARS)
    assert ((between > 0) & (between <= 1)).all()


def test_between_its_timesteps_it_is_between_its_neighbours() -> None:
    """Of data whose variance, seen as normal, grows with the noise level: each value between both neighbours' laws."""
    values = [exact(0.1)[20], exact(0.4)[60]]
    found = interpolated([20, 60], values, range(21, 60), ALPHA_BARS)
    assert (found < exact(0.1)[21:60]).all() and (found > exact(0.4)[21:60]).all()


def test_zero_terminal_snr_is_finite() -> None:
    alpha_bars = np.append(ALPHA_BARS[:-1], 0.0)
    assert np.isfinite(interpolated([0, 50, 99], [0.5, 0.9, 1.0], range(100), alpha_bars)).all()

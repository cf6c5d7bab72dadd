from __future__ import annotations

import math

import numpy as np
import pytest

from octavo.errors import OctavoError
from octavo.evaluation.intervals import Estimate, group_of, jackknife_estimate, mean_estimate, t_quantile


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 10, 19, 30, 101, 999, 20_000])
@pytest.mark.parametrize("probability", [0.9, 0.975, 0.995])
def test_quantiles_agree_with_scipy(freedom: int, probability: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert t_quantile(freedom, probability) == pytest.approx(stats.t.ppf(probability, freedom), rel=2e-4)


def test_mean_interval_covers_the_mean_95_times_in_100_even_of_three_seeds() -> None:
    rng = np.random.default_rng(0)
    estimates = [mean_estimate(rng.normal(3.0, 2.0, 3)) for _ in range(2000)]
    assert 0.93 < np.mean([e.low < 3.0 < e.high for e in estimates]) < 0.97


def test_one_value_has_no_interval_and_none_is_an_error() -> None:
    alone = mean_estimate([2.5])
    assert alone.value == 2.5 and math.isnan(alone.low) and math.isnan(alone.high)
    assert str(alone) == "2.500"
    with pytest.raises(OctavoError, match="none to take a mean of"):
        mean_estimate([])


def test_json_holds_no_infinity() -> None:
    assert mean_estimate([math.inf, 1.0]).as_json()["value"] is None
    assert Estimate(1.0, 0.5, math.nan, "m").as_json() == {
        "value": 1.0,
        "low": 0.5,
        "high": None,
        "method": "m",
    }


def test_jackknife_of_independent_sides_adds_variances_and_keeps_limits() -> None:
    one, other = [1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 1.0, 1.0]
    half = [jackknife_estimate(0.0, side).high for side in (one, other)]
    assert jackknife_estimate(0.0, one, other).high == pytest.approx(math.hypot(*half))
    cut = jackknife_estimate(0.5, one, low=0, high=1)
    assert (cut.low, cut.high) == (0, 1)
    with pytest.raises(OctavoError, match="at least 2 groups"):
        jackknife_estimate(0.0, [1.0])


def test_groups_are_interleaved_and_never_of_one_image() -> None:
    assert np.bincount(group_of(2000)).tolist() == [100] * 20
    assert np.bincount(group_of(9)).min() >= 2
    with pytest.raises(OctavoError, match="too few"):
        group_of(3)

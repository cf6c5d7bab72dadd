"""Plans of reuse: the optimum, the file, what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo.diffusion.reuse import ReusePlan, cheapest_plan, segment_costs, uniform
from octavo.diffusion.reuse.plan import plan_cost
from octavo.errors import OctavoError

PLAN = ReusePlan((900.0, 600.0, 300.0, 100.0), (1, 0, 0, 1), 2, "a model", {"why": "tests"})


@pytest.mark.parametrize("seed", range(5))
def test_the_plan_is_the_cheapest_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    steps = 7
    costs = rng.random((steps, steps + 1)).cumsum(axis=1)
    for recompute in range(1, steps + 1):
        every = [
            (1, *marks)
            for marks in itertools.product((0, 1), repeat=steps - 1)
            if sum(marks) == recompute - 1
        ]
        found, cost = cheapest_plan(costs, recompute)
        assert cost == pytest.approx(min(plan_cost(costs, marks) for marks in every))
        assert plan_cost(costs, found) == pytest.approx(cost) and sum(found) == recompute and found[0] == 1


def test_segments_that_were_not_measured_are_not_used() -> None:
    costs = segment_costs({((0,), 1): 0.5, ((1,), 2): 0.1, ((2,), 3): 0.1}, 4)
    assert cheapest_plan(costs, 2) == ((1, 0, 1, 0), 0.6)
    assert cheapest_plan(costs, 4)[1] == 0.0
    with pytest.raises(OctavoError, match="no plan of 1 whole steps"):
        cheapest_plan(costs, 1)


def test_whose_features_serve() -> None:
    assert [PLAN.sources(t) for t in (900.0, 600.0, 300.0, 100.0)] == [(), (900.0,), (900.0,), ()]
    assert PLAN.sources(601.0) == () and PLAN.share == 0.5
    assert uniform(7, 3) == (1, 0, 1, 0, 0, 1, 0) and uniform(4, 4) == (1, 1, 1, 1)


def test_a_plan_is_what_was_saved(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "reuse.json")
    assert ReusePlan.load(tmp_path / "reuse.json") == PLAN


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"format": "octavo trajectory"}, "not one that `octavo reuse` wrote"),
        ({"version": 2}, "upgrade octavo"),
        ({"extra": 1}, "unknown field 'extra'"),
        ({"timesteps": [600, 900, 300, 100]}, "do not descend"),
        ({"timesteps": ["900", 600, 300, 100]}, "not a number"),
        ({"timesteps": []}, "list of 1 to"),
        ({"recomputed": [0, 0, 0, 1]}, "the first of them 1"),
        ({"recomputed": [1, 0, 1]}, "for each timestep"),
        ({"recomputed": [1, 0, 2, 1]}, "0 or 1"),
        ({"depth": 0}, "depth"),
        ({"depth": True}, "depth"),
        ({"model": 7}, "model"),
        ({"facts": []}, "facts"),
    ],
)
def test_what_is_no_plan_is_refused(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(OctavoError, match=told):
        ReusePlan.from_dict({**PLAN.to_dict(), **changed})


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "reuse.json"
    path.write_text('{"format": "octavo reuse plan", "version": 1, "timesteps": [3]}')
    with pytest.raises(OctavoError, match=r"reuse.json: reuse plan: recomputed is missing"):
        ReusePlan.load(path)


def test_counts_out_of_range_are_told() -> None:
    with pytest.raises(OctavoError, match="between 1 and 3"):
        cheapest_plan(np.zeros((3, 4)), 4)
    with pytest.raises(OctavoError, match="between 1 and 3"):
        uniform(3, 0)
    with pytest.raises(OctavoError, match=r"is not \[K, .., K, K \+ 1\]"):
        cheapest_plan(np.zeros((3, 3)), 1)

"""Plans of reuse: the optimum, the file, what is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace
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


@pytest.mark.parametrize("order", [1, 2])
def test_forecasting_plans_are_the_cheapest_of_all(order: int) -> None:
    """What a segment costs depends on the whole steps before it, too."""
    rng = np.random.default_rng(order)
    steps = 7
    costs = rng.random((*[steps] * (order + 1), steps + 1)).cumsum(axis=-1)
    for recompute in range(1, steps + 1):
        every = [
            (1, *marks)
            for marks in itertools.product((0, 1), repeat=steps - 1)
            if sum(marks) == recompute - 1
        ]
        found, cost = cheapest_plan(costs, recompute)
        assert cost == pytest.approx(min(plan_cost(costs, marks) for marks in every))
        assert plan_cost(costs, found) == pytest.approx(cost) and sum(found) == recompute and found[0] == 1


def test_segments_have_their_place_among_the_costs() -> None:
    costs = segment_costs({((0,), 1): 0.5, ((0, 2), 3): 0.25}, 4, order=1)
    assert costs.shape == (4, 4, 5)
    assert plan_cost(costs, (1, 0, 1, 0)) == 0.75  # step 0 alone serves step 1, steps 0 and 2 serve step 3
    assert plan_cost(costs, (1, 1, 1, 1)) == 0.0 and np.isinf(plan_cost(costs, (1, 1, 1, 0)))


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


def test_forecasts_are_served_by_the_last_whole_steps() -> None:
    marks = (1, 0, 1, 1, 0, 0)
    steps = (900.0, 800.0, 600.0, 500.0, 300.0, 100.0)
    of_one, of_two = (ReusePlan(steps, marks, 1, order=order) for order in (1, 2))
    assert [of_one.sources(t) for t in steps] == [(), (900.0,), (), (), (500.0, 600.0), (500.0, 600.0)]
    assert of_two.sources(800.0) == (900.0,) and of_two.sources(100.0) == (500.0, 600.0, 900.0)
    assert str(of_two).endswith("#.##.. (forecast, order 2)")


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_plan_is_what_was_saved(order: int, tmp_path: Path) -> None:
    plan = replace(PLAN, order=order)
    plan.save(tmp_path / "reuse.json")
    assert ReusePlan.load(tmp_path / "reuse.json") == plan


def test_files_from_before_there_were_orders_reuse_features_as_they_are() -> None:
    old = {key: value for key, value in PLAN.to_dict().items() if key != "order"}
    assert ReusePlan.from_dict(old) == PLAN and PLAN.order == 0


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
        ({"order": 3}, "order '3' is not 0 to 2"),
        ({"order": -1}, "order"),
        ({"order": True}, "order"),
        ({"order": 1.0}, "order"),
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

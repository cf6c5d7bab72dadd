"""The choice under a budget, against all choices there are."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from octavo.errors import OctavoError
from octavo.study import budget
from octavo.study.budget import choose


def brute_force(costs: list[list[float]], effects: list[list[float]], limit: float) -> float:
    """The least effect of all choices within the budget."""
    return min(
        sum(effects[layer][o] for layer, o in enumerate(options))
        for options in product(*(range(len(row)) for row in costs))
        if sum(costs[layer][o] for layer, o in enumerate(options)) <= limit
    )


def random_problem(seed: int, whole: bool) -> tuple[list[list[float]], list[list[float]], float]:
    rng = np.random.default_rng(seed)
    layers = int(rng.integers(1, 8))
    costs = [sorted(rng.integers(1, 60, 3).astype(float) * 4, reverse=True) for _ in range(layers)]
    if not whole:
        costs = [[cost * float(rng.uniform(0.9, 1.1)) for cost in row] for row in costs]
    effects = [[0.0, *np.sort(rng.lognormal(0, 3, 2))] for _ in range(layers)]
    low, high = sum(min(row) for row in costs), sum(max(row) for row in costs)
    return costs, effects, float(rng.uniform(low, high))


@pytest.mark.parametrize("seed", range(40))
def test_whole_numbers_are_solved_exactly(seed: int) -> None:
    costs, effects, limit = random_problem(seed, whole=True)
    found = choose(costs, effects, limit)
    assert found.effect == pytest.approx(brute_force(costs, effects, limit), abs=1e-12)
    assert found.cost <= limit and found.bound == found.effect
    assert found.cost == pytest.approx(sum(row[o] for row, o in zip(costs, found.options, strict=True)))


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("units", [12, 20_000])
def test_fractions_keep_the_budget_and_the_bound_holds(
    seed: int, units: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "UNITS", units)
    costs, effects, limit = random_problem(seed, whole=False)
    found = choose(costs, effects, limit)
    best = brute_force(costs, effects, limit)
    assert found.cost <= limit * (1 + 1e-12)
    assert found.bound <= best * (1 + 1e-9) + 1e-12 and best <= found.effect * (1 + 1e-12) + 1e-12
    if units > 1000:
        assert found.effect == pytest.approx(best)


def test_many_layers_come_near_the_bound_quickly() -> None:
    rng = np.random.default_rng(0)
    weights = rng.integers(10_000, 3_000_000, 300)
    costs = [[4.0 * n, n + 7.0, n / 2 + 7.0] for n in weights]
    effects = [[0.0, *np.sort(rng.lognormal(-12, 2, 2))] for _ in weights]
    found = choose(costs, effects, 0.2 * 4 * float(weights.sum()))
    assert found.effect <= 1.01 * found.bound and found.bound > 0


def test_the_ends() -> None:
    costs, effects = [[8.0, 2.0], [8.0, 2.0]], [[0.0, 1.0], [0.0, 3.0]]
    assert choose(costs, effects, 4).options == (1, 1)
    assert choose(costs, effects, 16).options == (0, 0)
    assert choose(costs, effects, 1e9).effect == 0
    with pytest.raises(OctavoError, match=r"budget: 3\.9 is below 4"):
        choose(costs, effects, 3.9)


def test_of_equal_effects_the_cheapest_is_taken() -> None:
    assert choose([[9.0, 4.0, 4.0], [3.0, 1.0, 2.0]], [[0.0, 0.0, 2.0], [1.0, 1.0, 1.0]], 100).options == (
        1,
        0 + 1,
    )


def test_an_option_that_is_worse_and_dearer_is_never_taken() -> None:
    assert choose([[10.0, 4.0, 5.0]], [[0.0, 1.0, 2.0]], 6).options == (1,)


@pytest.mark.parametrize(
    ("costs", "effects"), [([[1.0]], [[1.0, 2.0]]), ([[]], [[]]), ([[float("nan")]], [[1.0]])]
)
def test_what_is_no_table_of_options_is_told(costs: list[list[float]], effects: list[list[float]]) -> None:
    with pytest.raises(OctavoError, match="options:"):
        choose(costs, effects, 1)

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from octavo.diffusion.trajectories import cheapest_paths, path_cost
from octavo.errors import OctavoError


def by_brute_force(jumps: np.ndarray, steps: int, start: np.ndarray | None) -> tuple[float, tuple[int, ...]]:
    """The cheapest of all paths of `steps` steps, each added up on its own."""
    num = len(jumps) - 1
    best: tuple[float, tuple[int, ...]] = (np.inf, ())
    for nodes in combinations(range(num, 0, -1), steps):
        if start is None and nodes[0] != num:
            continue
        cost = 0.0 if start is None else float(start[nodes[0] - 1])
        for t, s in zip(nodes, (*nodes[1:], 0), strict=True):
            cost += float(jumps[s, t])
        best = min(best, (cost, nodes))
    return best


@pytest.mark.parametrize("free_start", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_every_length_is_the_optimum_of_brute_force(seed: int, free_start: bool) -> None:
    rng = np.random.default_rng(seed)
    jumps = rng.normal(size=(13, 13))  # negative costs too, as Analytic-DPM's are
    start = rng.normal(size=12) if free_start else None
    paths = cheapest_paths(jumps, 12, start)
    for steps in range(1, 13):
        cost, nodes = by_brute_force(jumps, steps, start)
        assert paths.nodes[steps - 1] == nodes
        assert paths.costs[steps - 1] == pytest.approx(cost)
        assert path_cost(jumps, nodes, start) == pytest.approx(cost)


def test_forbidden_jumps_are_not_taken() -> None:
    jumps = np.ones((5, 5))
    jumps[0, 2:] = np.inf  # only node 1 reaches the image
    assert cheapest_paths(jumps, 3, np.zeros(4)).nodes == ((1,), (2, 1), (3, 2, 1))
    with pytest.raises(OctavoError, match="no path of 1 steps is allowed"):
        cheapest_paths(jumps, 3)


@pytest.mark.parametrize("steps", [0, 4])
def test_a_number_of_steps_out_of_range_is_told(steps: int) -> None:
    with pytest.raises(OctavoError, match=f"steps: {steps} is not between 1 and 3"):
        cheapest_paths(np.zeros((4, 4)), steps)


def test_what_is_no_cost_is_told() -> None:
    with pytest.raises(OctavoError, match="not a number"):
        cheapest_paths(np.full((3, 3), np.nan), 1)
    with pytest.raises(OctavoError, match="jumps: shape"):
        cheapest_paths(np.zeros((3, 4)), 1)
    with pytest.raises(OctavoError, match="start: is not 2 numbers"):
        cheapest_paths(np.zeros((3, 3)), 1, np.zeros(3))

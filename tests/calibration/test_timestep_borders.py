"""Borders between groups of timesteps: as good as the best of all cuts, and never too few pairs in a group."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest

from octavo.calibration.timestep_borders import search_borders

TIMESTEPS = [0.0, 10.0, 30.0, 60.0, 100.0, 150.0, 210.0, 280.0]
PAIRS = [30, 4, 9, 5, 20, 3, 8, 16]


def cost(cuts: tuple[int, ...], v: np.ndarray, counts: np.ndarray) -> float:
    total = 0.0
    for a, b in pairwise((0, *cuts, len(counts))):
        mean = np.average(v[a:b], axis=0, weights=counts[a:b])
        total += float((counts[a:b, None] * (v[a:b] - mean) ** 2).sum())
    return total


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_no_cut_is_better(groups: int) -> None:
    v = np.random.default_rng(groups).normal(size=(8, 5)).cumsum(axis=0)
    counts = np.array(PAIRS, dtype=float)
    allowed = [
        cuts
        for cuts in combinations(range(1, 8), groups - 1)
        if all(counts[a:b].sum() >= 16 for a, b in pairwise((0, *cuts, 8)))
    ]
    best = min(allowed, key=lambda cuts: cost(cuts, v, counts))
    expected = [(TIMESTEPS[cut - 1] + TIMESTEPS[cut]) / 2 for cut in best]
    assert len(allowed) > 1
    assert search_borders(TIMESTEPS, PAIRS, v, groups, least_pairs=16) == expected


def test_as_many_groups_as_there_are_pairs_for() -> None:
    v = np.arange(8.0)[:, None]
    assert len(search_borders(TIMESTEPS, PAIRS, v, 64, least_pairs=16)) == 3
    assert len(search_borders(TIMESTEPS, PAIRS, v, 64, least_pairs=40)) == 1
    assert search_borders(TIMESTEPS, PAIRS, v, 64, least_pairs=50) == []
    assert search_borders(TIMESTEPS[:1], PAIRS[:1], v[:1], 4) == []

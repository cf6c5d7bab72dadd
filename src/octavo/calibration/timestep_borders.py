"""Where to cut the timesteps into groups: exactly, by what the layers' inputs look like at each of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from octavo.diffusion.trajectories.dynamic_programming import cheapest_paths

LEAST_PAIRS = 16
"""Calibration pairs in each group: with fewer, a range is what a few images happened to reach."""


def search_borders(
    timesteps: Sequence[float],
    pairs: Sequence[int],
    log_ranges: NDArray[np.float64],
    most_groups: int,
    least_pairs: int = LEAST_PAIRS,
) -> list[float]:
    """The borders of at most `most_groups` groups of consecutive timesteps, ascending; none if one group is all.

    The groups minimise, over all cuts that leave each at least `least_pairs` pairs, the squared deviation of the
    layers' logarithmic ranges from their group's mean,

        sum over groups G, layers l, timesteps t in G of n[t] (v[l, t] - sum over u in G of n[u] v[l, u] / n[G])^2

    by dynamic programming (`cheapest_paths`): a factor by which a range is too wide or too narrow costs the same in
    every layer. A border lies midway between the timesteps that it parts. There are as many groups as the pairs allow.

    `timesteps` [T]: ascending. `pairs` [T]: n, how many were observed at each. `log_ranges` float64 [T, layers]: v, the
    mean over the pairs of a timestep.

    >>> search_borders([0, 10, 20, 30], [9] * 4, np.log([[1.0], [1.1], [5.0], [5.2]]), most_groups=2)
    [15.0]
    >>> search_borders([0, 10, 20, 30], [9] * 4, np.log([[1.0], [1.1], [5.0], [5.2]]), 2, least_pairs=20)
    []
    """
    counts = np.asarray(pairs, dtype=np.float64)
    most = min(most_groups, _most_groups(pairs, least_pairs))
    if most < 2:
        return []
    nodes = cheapest_paths(_costs(counts, np.asarray(log_ranges), least_pairs), most).nodes[most - 1]
    return [(timesteps[node - 1] + timesteps[node]) / 2 for node in sorted(nodes)[:-1]]


def _most_groups(pairs: Sequence[int], least_pairs: int) -> int:
    groups = filled = 0
    for count in pairs:
        filled += count
        if filled >= least_pairs:
            groups, filled = groups + 1, 0
    return groups


def _costs(counts: NDArray[np.float64], v: NDArray[np.float64], least_pairs: int) -> NDArray[np.float64]:
    """float64 [T + 1, T + 1]: entry [a, b] is the cost of a group of timesteps a .. b - 1; infinite where too few."""
    v = v - np.average(v, axis=0, weights=counts)
    zero = np.zeros(1)
    num = np.concatenate([zero, counts.cumsum()])
    first = np.concatenate([np.zeros((1, v.shape[1])), (counts[:, None] * v).cumsum(axis=0)])
    second = np.concatenate([zero, (counts * np.square(v).sum(axis=1)).cumsum()])
    costs = np.full((len(num), len(num)), np.inf)
    for a in range(len(counts)):
        n = num[a + 1 :] - num[a]
        within = second[a + 1 :] - second[a] - np.square(first[a + 1 :] - first[a]).sum(axis=1) / n
        costs[a, a + 1 :] = np.where(n >= least_pairs, within.clip(min=0), np.inf)
    return costs

"""Every trajectory on a grid of noise levels, tried: the exhaustive search of WaveGrad, for few steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from math import comb, floor, log10

import numpy as np
from numpy.typing import NDArray

from octavo.diffusion.trajectories.jump_costs import JumpCosts
from octavo.diffusion.trajectories.schedule import NoiseSchedule
from octavo.errors import OctavoError

MANTISSAS = (1.0, 3.0)
MAX_STEPS = 6
MOST_TRAJECTORIES = 20_000_000
"""More of them take minutes to add up, and the grid is then no longer what makes the search small."""
CHUNK = 65_536


@dataclass(frozen=True)
class Ranked:
    """The cheapest trajectories of a grid, the best first, and how many there were.

    timesteps  descending, of each.
    costs      of each, ascending.
    tried      every trajectory of the grid.
    """

    timesteps: tuple[tuple[int, ...], ...]
    costs: tuple[float, ...]
    tried: int


def noise_grid(
    schedule: NoiseSchedule, mantissas: Sequence[float] = MANTISSAS, lowest: int = 0
) -> tuple[int, ...]:
    """The timesteps, ascending, whose noise levels (1 - abar) / abar are nearest to m 10^e, for each mantissa m.

    All decades e that the schedule covers. WaveGrad's grid is of this form, m in 1 .. 9 with one decade for each of its
    6 steps, but of beta; on an image model's schedule no beta reaches the levels at which its sampling starts, hence
    the ratio of noise to signal here. Levels whose nearest timestep is the same count once, and
    those nearest to a timestep below `lowest` not at all. Raises `OctavoError` for
    mantissas out of [1, 10), or fewer than 2 timesteps.
    Source: Chen et al. (2009.00713), section 4 and appendix.

    >>> from diffusers import DDIMScheduler
    >>> from octavo.diffusion.trajectories import noise_schedule
    >>> len(noise_grid(noise_schedule(DDIMScheduler()))), noise_grid(noise_schedule(DDIMScheduler()), [1])[-3:]
    (16, (674, 825, 953))
    """
    for mantissa in mantissas:
        if not 1 <= mantissa < 10:
            raise OctavoError(f"mantissas: {mantissa!r} is not at least 1 and below 10")
    levels = np.log10((1 - schedule.alpha_bars) / np.maximum(schedule.alpha_bars, 1e-12))
    wanted = [
        exponent + log10(mantissa)
        for exponent in range(floor(levels[0]), floor(levels[-1]) + 1)
        for mantissa in mantissas
    ]
    within = [level for level in wanted if levels[0] <= level <= levels[-1]]
    nearest = {int(np.abs(levels - level).argmin()) for level in within}
    grid = tuple(sorted(t for t in nearest if t >= lowest))
    if len(grid) < 2:
        raise OctavoError(f"mantissas: give a grid of {len(grid)} timesteps on this schedule; give more")
    return grid


def check_grid(grid: Sequence[int], steps: int) -> int:
    """How many trajectories of `steps` steps the grid has.

    Raises `OctavoError` for more steps or trajectories than can be tried: beyond 6 steps, method dp.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= min(MAX_STEPS, len(grid)):
        raise OctavoError(
            f"steps: {steps!r} is not a whole number from 1 to {min(MAX_STEPS, len(grid))}, what a grid search of "
            f"{len(grid)} noise levels takes; method dp takes more"
        )
    trajectories = comb(len(grid), steps)
    if trajectories > MOST_TRAJECTORIES:
        raise OctavoError(
            f"mantissas: {trajectories:,} trajectories of {steps} steps on {len(grid)} noise levels are more than "
            f"{MOST_TRAJECTORIES:,}; give fewer mantissas"
        )
    return trajectories


def cheapest_on_grid(costs: JumpCosts, grid: Sequence[int], steps: int, keep: int = 1) -> Ranked:
    """The `keep` cheapest of all trajectories of `steps` timesteps of `grid`, each added up; nothing is left out.

    Every one of them is tried, none pruned: their costs come from the table of single jumps, which took one evaluation
    of the network for each timestep. Equal costs: the noisier trajectory first. Raises `OctavoError` as `check_grid`
    does, or for a timestep of the grid that `costs` does not know.
    """
    tried = check_grid(grid, steps)
    nodes = {t: 1 + i for i, t in enumerate(costs.candidates)}
    for t in grid:
        if t not in nodes:
            raise OctavoError(f"grid: {t} is not one of the {len(nodes)} candidates")
    descending = np.array([nodes[t] for t in sorted(grid, reverse=True)])
    best_costs, best = np.empty(0), np.empty((0, steps), dtype=np.int64)
    for chosen in _chunks(len(grid), steps):
        visited = descending[chosen]
        total = costs.start[visited[:, 0] - 1] + costs.jumps[0, visited[:, -1]]
        for before, after in zip(visited.T[:-1], visited.T[1:], strict=True):
            total = total + costs.jumps[after, before]
        best_costs, best = np.concatenate([best_costs, total]), np.concatenate([best, visited])
        order = np.argsort(best_costs, kind="stable")[:keep]
        best_costs, best = best_costs[order], best[order]
    timesteps = tuple(tuple(costs.candidates[node - 1] for node in row) for row in best)
    return Ranked(timesteps, tuple(float(cost) for cost in best_costs), tried)


def _chunks(count: int, steps: int) -> Iterator[NDArray[np.int64]]:
    """All ascending choices of `steps` of `count` places, int64 [n, steps], a bounded number at a time."""
    every = combinations(range(count), steps)
    while chunk := list(islice(every, CHUNK)):
        yield np.array(chunk, dtype=np.int64)

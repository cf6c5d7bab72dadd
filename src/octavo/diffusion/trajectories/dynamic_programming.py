"""The cheapest trajectory of every length, exactly: dynamic programming over the costs of single jumps."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from octavo.diffusion.trajectories.schedule import Floats
from octavo.errors import OctavoError


@dataclass(frozen=True)
class Paths:
    """The cheapest path of each number of steps 1 .. max_steps.

    costs  costs[K - 1]: what the cheapest path of exactly K steps costs.
    nodes  nodes[K - 1]: the K nodes that it visits, descending, without node 0.
    """

    costs: tuple[float, ...]
    nodes: tuple[tuple[int, ...], ...]


def cheapest_paths(jumps: Floats, max_steps: int, start: Floats | None = None) -> Paths:
    """C[k, t] = min over s < t of C[k - 1, s] + F[s, t], backtracked, for every K up to `max_steps`.

    jumps      F, float [N + 1, N + 1]: F[s, t] is the cost of the jump from node t to node s < t; node 0 is the image,
               nodes 1 .. N the candidate timesteps in ascending order. Other entries are not read. Costs may be
               negative, or infinite where a jump is forbidden, but not NaN.
    max_steps  1 .. N. Each step is one evaluation of the network, at the node that is jumped from.
    start      float [N]: what it costs to begin at node 1 + i. None: every path begins at node N, for nothing.

    Returns the optimum: O(max_steps N^2) time, O(N^2 + max_steps N) memory. Of equal costs the lower node wins. Raises
    `OctavoError` for shapes that do not fit, NaN, or a number of steps that no path has.
    Source: Watson et al. (2106.03802), algorithm 1.

    >>> F = np.array([[0, 1, 4, 9], [0, 0, 1, 4], [0, 0, 0, 1], [0, 0, 0, 0]], dtype=float)
    >>> cheapest_paths(F, 3).nodes
    ((3,), (3, 1), (3, 2, 1))
    """
    num = len(jumps) - 1
    if jumps.shape != (num + 1, num + 1) or num < 1:
        raise OctavoError(f"jumps: shape {jumps.shape} is not [N + 1, N + 1] with N at least 1")
    if not 1 <= max_steps <= num:
        raise OctavoError(f"steps: {max_steps} is not between 1 and {num}, the number of candidate timesteps")
    earlier = np.arange(num + 1)[:, None] < np.arange(num + 1)[None, :]
    if np.isnan(jumps[earlier]).any():
        raise OctavoError("jumps: a cost is not a number")
    allowed = np.where(earlier, jumps, np.inf)
    begin = _begin(start, num)
    cheapest = np.full(num + 1, np.inf)  # C[k - 1, :]; with no steps left, one is at the image
    cheapest[0] = 0.0
    came_from: list[np.ndarray] = []
    costs, nodes = [], []
    for steps in range(1, max_steps + 1):
        through = cheapest[:, None] + allowed
        best = through.argmin(axis=0)
        came_from.append(best)
        cheapest = np.take_along_axis(through, best[None], axis=0)[0]
        total = cheapest + begin
        node = int(total.argmin())
        if total[node] == np.inf:
            raise OctavoError(f"steps: no path of {steps} steps is allowed")
        costs.append(float(total[node]))
        path = []
        for step in range(steps, 0, -1):
            path.append(node)
            node = int(came_from[step - 1][node])
        nodes.append(tuple(path))
    return Paths(tuple(costs), tuple(nodes))


def path_cost(jumps: Floats, nodes: tuple[int, ...], start: Floats | None = None) -> float:
    """What one path costs: the cost of its start and of its jumps. `nodes` as in `Paths`, descending, without node 0.

    >>> path_cost(np.array([[0.0, 2.0, 5.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), (2, 1))
    3.0
    """
    ends = (*nodes, 0)
    begin = _begin(start, len(jumps) - 1)[nodes[0]]
    return float(begin + sum(jumps[s, t] for t, s in pairwise(ends)))


def _begin(start: Floats | None, num: int) -> Floats:
    begin = np.full(num + 1, np.inf)
    if start is None:
        begin[num] = 0.0
    elif start.shape != (num,) or np.isnan(start).any():
        raise OctavoError(f"start: is not {num} numbers, one for each candidate timestep")
    else:
        begin[1:] = start
    return begin

"""The least total effect under a budget: one option for each layer, by dynamic programming"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from octavo.errors import OctavoError

UNITS = 50_000
"""Parts that the budget is counted in, where its own steps are more."""
HALVINGS = 200


@dataclass(frozen=True)
class Choice:
    """One option for each layer.

    options  the index of each layer's option.
    cost     the sum of their costs, at most the budget.
    effect   the sum of their effects.
    bound    no choice within the budget has an effect below this (equal to `effect` where the choice is exact).
    """

    options: tuple[int, ...]
    cost: float
    effect: float
    bound: float


def choose(costs: Sequence[Sequence[float]], effects: Sequence[Sequence[float]], budget: float) -> Choice:
    """Minimise sum_l effect[l][o_l] subject to sum_l cost[l][o_l] <= budget: the multiple-choice knapsack.

    `costs[l]`, `effects[l]`: one finite number for each option of layer l, effects at least 0, any order; any unit.

    Dynamic programming over what the budget leaves above the cheapest choice (Dudzinski and Walukiewicz 1987). Counted
    in the greatest common divisor of the cost differences it is exact, if they are whole numbers and the budget has at
    most `UNITS` such steps. Else each difference is rounded UP to a `UNITS`-th of the budget, so that the choice keeps
    the budget, what is left is spent where it lowers the effect, and `bound` says how far from the best it can be:
    the Lagrangian bound max over lambda >= 0 of sum_l min_o (effect + lambda cost) - lambda budget. Of choices of equal
    effect that of least cost is taken. Raises `OctavoError` when even the cheapest options exceed the budget.

    >>> choose([[4, 1], [4, 1]], [[0, 9], [0, 5]], budget=5)
    Choice(options=(0, 1), cost=5.0, effect=5.0, bound=5.0)
    """
    cost_of, effect_of = _checked(costs, effects)
    least = [row.min() for row in cost_of]
    span = budget - math.fsum(least)
    if span < 0:
        raise OctavoError(
            f"budget: {budget:g} is below {math.fsum(least):g}, the cost of the cheapest options"
        )
    above = [row - low for row, low in zip(cost_of, least, strict=True)]
    unit, exact = _unit(above, span)
    steps = [np.ceil(row / unit - 1e-9).astype(np.int64) for row in above]
    chosen = _dynamic_programme(steps, effect_of, int(span / unit + 1e-9))
    if not exact:
        chosen = _spend_the_rest(chosen, above, effect_of, span)
    cost = math.fsum(row[o] for row, o in zip(cost_of, chosen, strict=True))
    effect = math.fsum(row[o] for row, o in zip(effect_of, chosen, strict=True))
    bound = effect if exact else min(effect, _lagrangian_bound(above, effect_of, span))
    return Choice(tuple(chosen), cost, effect, bound)


def _checked(
    costs: Sequence[Sequence[float]], effects: Sequence[Sequence[float]]
) -> tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]]:
    rows = [[np.asarray(row, dtype=np.float64) for row in table] for table in (costs, effects)]
    if [len(row) for row in rows[0]] != [len(row) for row in rows[1]] or not all(len(row) for row in rows[0]):
        raise OctavoError("options: every layer needs as many costs as effects, and at least one")
    if not all(np.isfinite(row).all() for table in rows for row in table):
        raise OctavoError("options: costs and effects must be finite numbers")
    return rows[0], rows[1]


def _unit(above: Sequence[NDArray[np.float64]], span: float) -> tuple[float, bool]:
    """The step in which the budget is counted, and whether that loses nothing."""
    values = [float(value) for row in above for value in row]
    if all(value.is_integer() for value in values):
        divisor = math.gcd(*(int(value) for value in values)) or 1
        if span / divisor <= UNITS:
            return float(divisor), True
    return max(span / UNITS, 1e-300), False


def _dynamic_programme(
    steps: Sequence[NDArray[np.int64]], effects: Sequence[NDArray[np.float64]], capacity: int
) -> list[int]:
    """best[w]: the least effect of the layers so far that takes at most w steps."""
    best = np.zeros(capacity + 1)
    taken = np.zeros((len(steps), capacity + 1), dtype=np.int16)
    for layer, (cost, effect) in enumerate(zip(steps, effects, strict=True)):
        after = np.full(capacity + 1, np.inf)
        for option in np.argsort(cost, kind="stable"):
            start = int(cost[option])
            if start > capacity:
                continue
            candidate = best[: capacity + 1 - start] + effect[option]
            better = candidate < after[start:]
            after[start:][better] = candidate[better]
            taken[layer, start:][better] = option
        best = after
    left = int(np.argmax(best == best[capacity]))  # the fewest steps of that effect
    chosen = [0] * len(steps)
    for layer in range(len(steps) - 1, -1, -1):
        chosen[layer] = int(taken[layer, left])
        left -= int(steps[layer][chosen[layer]])
    return chosen


def _spend_the_rest(
    chosen: list[int],
    above: Sequence[NDArray[np.float64]],
    effects: Sequence[NDArray[np.float64]],
    span: float,
) -> list[int]:
    """Single changes that lower the effect and fit into what rounding up left over, the best first."""
    chosen = list(chosen)
    while True:
        rest = span - math.fsum(row[o] for row, o in zip(above, chosen, strict=True))
        gains = [
            (effects[layer][now] - effects[layer][other], layer, other)
            for layer, now in enumerate(chosen)
            for other in range(len(above[layer]))
            if effects[layer][other] < effects[layer][now] and above[layer][other] - above[layer][now] <= rest
        ]
        if not gains:
            return chosen
        _, layer, other = max(gains)
        chosen[layer] = other


def _lagrangian_bound(
    above: Sequence[NDArray[np.float64]], effects: Sequence[NDArray[np.float64]], span: float
) -> float:
    """The dual function is concave in lambda: its slope, cost less budget, is searched for a change of sign."""

    def dual(factor: float) -> tuple[float, float]:
        value, used = -factor * span, 0.0
        for cost, effect in zip(above, effects, strict=True):
            total = effect + factor * cost
            option = int(np.argmin(total))
            value, used = value + float(total[option]), used + float(cost[option])
        return value, used - span

    best, slope = dual(0.0)
    if slope <= 0:  # the best options of all fit
        return best
    if span == 0:  # every layer keeps its cheapest option
        return math.fsum(float(effect[cost == 0].min()) for cost, effect in zip(above, effects, strict=True))
    low, high = 0.0, 1.0
    while dual(high)[1] > 0 and high < 1e200:
        high *= 4
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        value, slope = dual(middle)
        best = max(best, value)
        low, high = (middle, high) if slope > 0 else (low, middle)
    return best

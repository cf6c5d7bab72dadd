"""The joint choice by as few measurements as it takes: time is known beforehand, quality is bisected and bounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """One way to sample, for any number of steps: what network, what solver, what kind of timesteps."""

    recipe: str
    solver: str
    spacing: str

    def __str__(self) -> str:
        return f"{self.recipe}, {self.solver}, {self.spacing}"


@dataclass(frozen=True)
class Choice:
    """A curve at a number of steps, and the seconds that an image will take: evaluations x seconds of one."""

    curve: Curve
    steps: int
    seconds: float


Curves = Sequence[Sequence[Choice]]
"""For each curve its choices, steps and seconds ascending."""


def fastest(
    curves: Curves,
    is_good: Callable[[Choice], bool],
    on_open: Callable[[Curves], object] = lambda curves: None,
) -> Choice | None:
    """The choice with the fewest seconds of those that are good; None if there is none.

    Curve by curve, the one with the least time for its most steps first. Only what is faster than the best so far is
    looked at: first the slowest of it, which if it is not good ends the curve; then, by bisection, the fewest steps
    that are good. That more steps are never worse is taken for granted, a heuristic: with curves that are monotone the
    result is the optimum. Of n curves with m choices each, at most n (1 + log2 m) are asked for. `on_open` is told
    before each curve of what may still be asked: of this curve and those after it, the choices that are fast enough.

    >>> curve = [Choice(Curve("best", "ddim", "dp"), steps, steps / 10) for steps in (5, 10, 20, 50)]
    >>> fastest([curve], lambda choice: choice.steps >= 12).steps
    20
    """
    best: Choice | None = None
    ordered = sorted((curve for curve in curves if curve), key=lambda curve: curve[-1].seconds)
    for place in range(len(ordered)):
        still = [
            [choice for choice in curve if best is None or choice.seconds < best.seconds]
            for curve in ordered[place:]
        ]
        on_open([curve for curve in still if curve])
        open_ = still[0]
        if not open_ or not is_good(open_[-1]):
            continue
        low, high = 0, len(open_) - 1  # open_[high] is good
        while low < high:
            middle = (low + high) // 2
            if is_good(open_[middle]):
                high = middle
            else:
                low = middle + 1
        best = open_[high]
    return best


def most_asked(costs: Sequence[int]) -> int:
    """The most that `fastest` may spend on a curve whose choices cost `costs` to look at, steps ascending.

    >>> most_asked([1, 2, 4, 8])  # 8 first, then 2, then 4
    14
    """

    def halving(low: int, high: int) -> int:
        if low >= high:
            return 0
        middle = (low + high) // 2
        return costs[middle] + max(halving(low, middle), halving(middle + 1, high))

    return max((costs[last] + halving(0, last) for last in range(len(costs))), default=0)


def best_within(curves: Curves, seconds: float, badness: Callable[[Choice], float]) -> Choice | None:
    """The choice with the least badness of those that take at most `seconds`; None if nothing is so fast.

    Of each curve the most steps that fit, by the same heuristic as `fastest`. Equal badness: the faster.

    >>> curve = [Choice(Curve("best", "ddim", "dp"), steps, steps / 10) for steps in (5, 10, 20, 50)]
    >>> best_within([curve], 1.5, lambda choice: 1 / choice.steps).steps
    10
    """
    fitting = [[choice for choice in curve if choice.seconds <= seconds] for curve in curves]
    slowest = sorted((choices[-1] for choices in fitting if choices), key=lambda choice: choice.seconds)
    return min(slowest, key=badness, default=None)


def pareto_front(scored: Sequence[tuple[Choice, float]]) -> list[tuple[Choice, float]]:
    """Of choices with their badness, those that no other beats in both time and badness; fastest first.

    >>> a, b, c = (Choice(Curve("best", "ddim", "dp"), steps, steps / 10) for steps in (5, 10, 20))
    >>> [choice.steps for choice, _ in pareto_front([(c, 2.0), (b, 3.0), (a, 3.0)])]
    [5, 20]
    """
    front: list[tuple[Choice, float]] = []
    for choice, badness in sorted(scored, key=lambda pair: (pair[0].seconds, pair[1])):
        if not front or badness < front[-1][1]:
            front.append((choice, badness))
    return front

"""A reuse plan: the steps that compute the whole network, and those that reuse the deep features of an earlier one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any

import numpy as np

from octavo.diffusion.reuse.forecast import MAX_ORDER
from octavo.diffusion.trajectories.schedule import Floats
from octavo.errors import OctavoError, quoted
from octavo.files import read_json, write_json

FORMAT = "octavo reuse plan"
VERSION = 1
MAX_STEPS = 10_000
TOO_OLD = "recompute: no plan of {} whole steps keeps features as young as max_age asks; give more of one"


@dataclass(frozen=True)
class ReusePlan:
    """Which of a sampler's steps compute the whole network; the others take deep features of the last whole ones.

    timesteps   float, as the sampler tells them to the network, descending.
    recomputed  0/1 for each timestep, the first 1: whether the whole network is computed there.
    depth       how many skip connections (transformers: blocks at either end) are computed at every step.
    model       `octavo.fingerprint.model_identity` of the network it was made on; None: of no one model.
    facts       whatever else is worth keeping: JSON-safe, for people.
    order       0: the last whole step's features are reused as they are. 1 or 2: forecast from the last two or three
                whole steps (`octavo.diffusion.reuse.forecast`), from fewer while there are no more.

    Raises `OctavoError` for what is no plan. Source of the idea: DeepCache (2312.00858), section 3.

    >>> plan = ReusePlan((900.0, 600.0, 300.0), (1, 0, 1), depth=1)
    >>> plan.sources(600.0), plan.sources(300.0), plan.share
    ((900.0,), (), 0.6666666666666666)
    """

    timesteps: tuple[float, ...]
    recomputed: tuple[int, ...]
    depth: int
    model: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    order: int = 0

    def __post_init__(self) -> None:
        steps = self.timesteps
        if not isinstance(steps, (list, tuple)) or not 1 <= len(steps) <= MAX_STEPS:
            raise OctavoError(f"reuse plan: timesteps are not a list of 1 to {MAX_STEPS} numbers")
        if not all(type(t) in (int, float) and np.isfinite(t) for t in steps):
            raise OctavoError("reuse plan: a timestep is not a number")
        if any(after >= before for before, after in pairwise(steps)):
            raise OctavoError("reuse plan: timesteps do not descend")
        object.__setattr__(self, "timesteps", tuple(float(t) for t in steps))
        marks = self.recomputed
        if (
            not isinstance(marks, (list, tuple))
            or len(marks) != len(steps)
            or any(type(m) is not int or m not in (0, 1) for m in marks)
            or marks[0] != 1
        ):
            raise OctavoError("reuse plan: recomputed is not a 0 or 1 for each timestep, the first of them 1")
        object.__setattr__(self, "recomputed", tuple(marks))
        if type(self.depth) is not int or not 1 <= self.depth <= 1000:
            raise OctavoError(f"reuse plan: depth {str(self.depth)[:60]!r} is not a whole number from 1")
        if self.model is not None and (not isinstance(self.model, str) or len(self.model) > 200):
            raise OctavoError("reuse plan: model is not a short text")
        if not isinstance(self.facts, Mapping):
            raise OctavoError("reuse plan: facts are not a JSON object")
        if type(self.order) is not int or not 0 <= self.order <= MAX_ORDER:
            raise OctavoError(f"reuse plan: order {str(self.order)[:60]!r} is not 0 to {MAX_ORDER}")

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @property
    def share(self) -> float:
        """The share of steps that compute the whole network."""
        return sum(self.recomputed) / len(self.recomputed)

    def share_of(self, timesteps: Sequence[float]) -> float:
        """The share of a run's evaluations, at these timesteps one after another, that compute the whole network.

        Solvers may evaluate a step twice; a run may begin within the plan, and is whole until its first whole step.

        >>> plan = ReusePlan((900.0, 600.0, 300.0), (1, 0, 1), depth=1)
        >>> plan.share_of([900.0, 600.0, 600.0, 300.0, 300.0]), plan.share_of([600.0, 300.0])
        (0.6, 1.0)
        """
        whole, known = 0, False
        for timestep in timesteps:
            reuses = bool(self.sources(timestep)) and known
            known = known or (timestep in self.timesteps and not self.sources(timestep))
            whole += not reuses
        return whole / len(timesteps)

    def sources(self, timestep: float) -> tuple[float, ...]:
        """The timesteps whose deep features serve this one, the last whole one first; () where all is computed.

        At most order + 1 of them. The whole network is computed at timesteps that are none of the plan's, too.
        """
        whole: tuple[float, ...] = ()
        for t, mark in zip(self.timesteps, self.recomputed, strict=True):
            whole = (t, *whole)[: self.order + 1] if mark else whole
            if t == timestep:
                return () if mark else whole
        return ()

    def __str__(self) -> str:
        marks = "".join("#" if mark else "." for mark in self.recomputed)
        order = f" (forecast, order {self.order})" if self.order else ""
        return f"{sum(self.recomputed)} of {self.num_steps} steps compute the whole network: {marks}{order}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe, every field, with the format's name and version."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {name: list(values[name]) for name in ("timesteps", "recomputed")}
        return {"format": FORMAT, "version": VERSION, **values, "facts": dict(self.facts)}

    @classmethod
    def from_dict(cls, state: Any) -> ReusePlan:
        """The inverse of `to_dict`. Raises `OctavoError` for whatever it did not write."""
        if not isinstance(state, Mapping) or state.get("format") != FORMAT:
            raise OctavoError("reuse plan: is not one that `octavo reuse` wrote")
        if type(state.get("version")) is not int or state["version"] != VERSION:
            raise OctavoError(
                f"reuse plan: version {quoted(state.get('version'))} is not {VERSION}; upgrade octavo"
            )
        given = {key: value for key, value in state.items() if key not in ("format", "version")}
        known = [f.name for f in fields(cls)]
        for key in given:
            if key not in known:
                raise OctavoError(f"reuse plan: unknown field {str(key)[:60]!r}; upgrade octavo")
        for name in known[:3]:
            if name not in given:
                raise OctavoError(f"reuse plan: {name} is missing; make it again")
        return cls(**given)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ReusePlan:
        """Read what `save` wrote. Raises `OctavoError`, which names the file, for anything else."""
        state = read_json(path)
        try:
            return cls.from_dict(state)
        except OctavoError as error:
            raise OctavoError(f"{path}: {error}") from error


def cheapest_plan(costs: Floats, recompute: int) -> tuple[tuple[int, ...], float]:
    """The marks of the plan with exactly `recompute` whole steps whose segments cost least, and what they cost.

    costs: float [K, .., K, K + 1] with order + 1 axes of K; costs[.., h, i, j], j > i > h, is what it costs that steps
    i + 1 .. j - 1 take the deep features of the last whole steps i, h, .., infinite where that is not allowed (j = K:
    the end). While there are fewer whole steps than axes, step 0, the first of them, stands in all that are left over.
    The optimum, by dynamic programming over the last whole steps: with C[k, .., h, i] the least cost up to step i, the
    k-th whole one, C[k + 1, .., i, j] = min over the first axis of C[k, .., h, i] + costs[.., h, i, j]. Of equal costs
    the earlier step wins. O(K^(order + 2)) memory, as often as there are whole steps in time. Raises `OctavoError`
    where no plan has that many.

    >>> costs = np.array([[0, 0, 1.0, 9], [0, 0, 0, 2], [0, 0, 0, 0]])
    >>> cheapest_plan(costs, 2)
    ((1, 0, 1), 1.0)
    """
    steps = len(costs)
    if costs.ndim < 2 or costs.shape != (*[steps] * (costs.ndim - 1), steps + 1):
        raise OctavoError(f"costs: shape {costs.shape} is not [K, .., K, K + 1]")
    if not 1 <= recompute <= steps:
        raise OctavoError(f"recompute: {recompute} is not between 1 and {steps}, the number of steps")
    later = np.arange(steps + 1) > np.arange(steps)[:, None]
    costs = np.where(later, costs, np.inf)
    cheapest = np.full(costs.shape[:-1], np.inf)
    cheapest.flat[0] = 0.0
    came_from = []
    for _ in range(recompute - 1):
        through = cheapest[..., None] + costs[..., :steps]
        came_from.append(through.argmin(axis=0))
        cheapest = through.min(axis=0)
    total = cheapest + costs[..., steps]
    last = np.unravel_index(int(total.argmin()), total.shape)
    if np.isinf(total[last]):
        raise OctavoError(TOO_OLD.format(recompute))
    cost, whole = float(total[last]), {int(last[-1])}
    for before in reversed(came_from):
        last = (before[last], *last[:-1])
        whole.add(int(last[-1]))
    return tuple(int(i in whole) for i in range(steps)), cost


def check_whole_steps(steps: int, recompute: int, max_age: int | None, *, even: bool = False) -> None:
    """Raise `OctavoError`, before anything is measured, where no plan of so many whole steps keeps features so young.

    `even`: of evenly spaced ones. `max_age` None: any age will do.

    >>> check_whole_steps(50, 10, 4), check_whole_steps(50, 10, 4, even=True)
    (None, None)
    >>> check_whole_steps(50, 10, 3)
    Traceback (most recent call last):
    octavo.errors.OctavoError: recompute: no plan of 10 whole steps keeps features as young as max_age asks; ...
    """
    marks = uniform(steps, recompute)
    if max_age is None:
        return
    if recompute * (max_age + 1) < steps:
        raise OctavoError(TOO_OLD.format(recompute))
    whole = [*(i for i, mark in enumerate(marks) if mark), steps]
    if even and max(after - before for before, after in pairwise(whole)) > max_age + 1:
        raise OctavoError(
            f"recompute: {recompute} even steps are farther apart than max_age; give more of one"
        )


def uniform(steps: int, recompute: int) -> tuple[int, ...]:
    """The marks of evenly spaced whole steps, as DeepCache (2312.00858) has them by default.

    >>> uniform(6, 2)
    (1, 0, 0, 1, 0, 0)
    """
    if not 1 <= recompute <= steps:
        raise OctavoError(f"recompute: {recompute} is not between 1 and {steps}, the number of steps")
    whole = {round(i * steps / recompute) for i in range(recompute)}
    return tuple(int(i in whole) for i in range(steps))


def plan_cost(costs: Floats, recomputed: Sequence[int]) -> float:
    """What a plan's segments cost by `costs`, see `cheapest_plan`."""
    whole = [i for i, mark in enumerate(recomputed) if mark]
    axes = costs.ndim - 1
    ends = [*whole[1:], len(recomputed)]
    return float(sum(costs[(*_place(whole[: k + 1], axes), end)] for k, end in enumerate(ends)))


def segment_costs(errors: Mapping[tuple[tuple[int, ...], int], float], steps: int, order: int = 0) -> Floats:
    """`costs` of `cheapest_plan` from errors[whole, m], what all steps after the last of `whole` up to m cost together.

    whole: the last whole steps, ascending, at most order + 1 of them. Segments that were not measured are not allowed;
    a whole step that another, or the end, follows costs nothing.
    """
    costs = np.full((*[steps] * (order + 1), steps + 1), np.inf)
    for i in range(steps):
        costs[..., i, i + 1] = 0.0
    for (whole, m), error in errors.items():
        costs[(*_place(whole, order + 1), m + 1)] = error
    return costs


def _place(whole: Sequence[int], axes: int) -> tuple[int, ...]:
    """Where the last `axes` of whole steps have their costs; the first of all is step 0."""
    return (0,) * (axes - len(whole)) + tuple(whole[-axes:])

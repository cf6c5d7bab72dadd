"""A reuse plan: the steps that compute the whole network, and those that reuse the deep features of an earlier one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any

import numpy as np

from octavo.diffusion.trajectories.dynamic_programming import cheapest_paths
from octavo.diffusion.trajectories.schedule import Floats
from octavo.errors import OctavoError
from octavo.files import read_json, write_json

FORMAT = "octavo reuse plan"
VERSION = 1
MAX_STEPS = 10_000


@dataclass(frozen=True)
class ReusePlan:
    """Which of a sampler's steps compute the whole network; the others reuse the last whole one's deep features.

    timesteps   float, as the sampler tells them to the network, descending.
    recomputed  0/1 for each timestep, the first 1: whether the whole network is computed there.
    depth       how many skip connections (transformers: blocks at either end) are computed at every step.
    model       `octavo.fingerprint.model_identity` of the network it was made on; None: of no one model.
    facts       whatever else is worth keeping: JSON-safe, for people.

    Raises `OctavoError` for what is no plan. Source of the idea: DeepCache (2312.00858), section 3.

    >>> plan = ReusePlan((900.0, 600.0, 300.0), (1, 0, 1), depth=1)
    >>> plan.source(600.0), plan.source(300.0), plan.share
    (900.0, None, 0.6666666666666666)
    """

    timesteps: tuple[float, ...]
    recomputed: tuple[int, ...]
    depth: int
    model: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

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

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @property
    def share(self) -> float:
        """The share of steps that compute the whole network."""
        return sum(self.recomputed) / len(self.recomputed)

    def source(self, timestep: float) -> float | None:
        """The timestep whose deep features serve this one; None where the whole network is computed.

        The whole network is computed at timesteps that are none of the plan's, too.
        """
        source = None
        for t, mark in zip(self.timesteps, self.recomputed, strict=True):
            source = t if mark else source
            if t == timestep:
                return None if mark else source
        return None

    def __str__(self) -> str:
        marks = "".join("#" if mark else "." for mark in self.recomputed)
        return f"{sum(self.recomputed)} of {self.num_steps} steps compute the whole network: {marks}"

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
                f"reuse plan: version {state.get('version')!r} is not {VERSION}; upgrade octavo"
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

    costs: float [K, K + 1]; costs[i, j], j > i, is what it costs that steps i + 1 .. j - 1 reuse the deep features of
    step i, infinite where that is not allowed (j = K: the end). The optimum, by the dynamic programming of Watson et
    al. (2106.03802), algorithm 1, with step i as node K - i. Raises `OctavoError` where no plan has that many.

    >>> costs = np.array([[0, 0, 1.0, 9], [0, 0, 0, 2], [0, 0, 0, 0]])
    >>> cheapest_plan(costs, 2)
    ((1, 0, 1), 1.0)
    """
    steps = len(costs)
    if costs.shape != (steps, steps + 1) or steps < 1:
        raise OctavoError(f"costs: shape {costs.shape} is not [K, K + 1]")
    if not 1 <= recompute <= steps:
        raise OctavoError(f"recompute: {recompute} is not between 1 and {steps}, the number of steps")
    jumps = np.zeros((steps + 1, steps + 1))
    for i in range(steps):
        for j in range(i + 1, steps + 1):
            jumps[steps - j, steps - i] = costs[i, j]
    never = 1 + 2 * float(np.abs(jumps[np.isfinite(jumps)]).sum())  # dearer than all that is allowed
    paths = cheapest_paths(np.where(np.isinf(jumps), never, jumps), recompute)
    if paths.costs[recompute - 1] >= never:
        raise OctavoError(
            f"recompute: no plan of {recompute} whole steps keeps features as young as max_age asks; give more of one"
        )
    whole = {steps - node for node in paths.nodes[recompute - 1]}
    return tuple(int(i in whole) for i in range(steps)), paths.costs[recompute - 1]


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
    return float(sum(costs[i, j] for i, j in pairwise([*whole, len(recomputed)])))


def segment_costs(errors: Mapping[tuple[int, int], float], steps: int) -> Floats:
    """`costs` of `cheapest_plan` from errors[i, m], what all of steps i + 1 .. m together cost that reuse step i.

    Segments that were not measured are not allowed; a step that nothing follows costs nothing.
    """
    costs = np.full((steps, steps + 1), np.inf)
    for i in range(steps):
        costs[i, i + 1] = 0.0
    for (i, m), error in errors.items():
        costs[i, m + 1] = error
    return costs

"""A sampler's run along a reuse plan: the deep features that it has kept, and when another run has begun."""

from __future__ import annotations

import logging
import threading
from typing import Any

import torch

from octavo.diffusion.reuse import ReusePlan
from octavo.errors import OctavoError

logger = logging.getLogger(__name__)
MOST_PLACES = 8
"""Calls of the network at one timestep whose deep features are kept."""
Shapes = tuple[tuple[int, ...], ...]


class Run(threading.local):
    """The run of each thread: threads that share a network do not share features.

    A run goes on at the timestep where it is, or at the plan's next one. Any other begins a new run, which has no
    features, and so does a new `schedule`: the scheduler's timesteps, an object that each call of a pipeline makes
    anew, so that what an interrupted call left behind is not taken either.

    schedule  the one that is there before anything runs; None: of no pipeline.
    """

    def __init__(self, plan: ReusePlan, schedule: Any = None) -> None:
        self.plan = plan
        self.schedule = schedule
        self.now: float | None = None
        self.place = 0
        self._kept: dict[float, list[tuple[Shapes, torch.Tensor]]] = {}
        self._of_pipeline = False
        self._warned = False

    def step(self, timestep: float, schedule: Any) -> None:
        """The network is called at `timestep`, under `schedule`.

        A timestep that is none of the plan's is warned of, once. Raises `OctavoError` where a pipeline's run leaves out
        steps of the plan: it has another number of steps.
        """
        before, self.now = self.now, timestep
        if schedule is not self.schedule:
            self.schedule, self._of_pipeline, self._kept, self.place = schedule, True, {}, 0
        elif timestep == before:
            self.place += 1
            return
        else:
            self.place = 0
            if before is not None and not self._is_next(before, timestep):
                self._begin(before, timestep)
        if timestep not in self.plan.timesteps:
            self._warn(
                f"timestep {timestep:g} is none of its {self.plan.num_steps}; the whole network is computed there "
                "(make a plan for these steps)"
            )

    def _is_next(self, before: float, timestep: float) -> bool:
        steps = self.plan.timesteps
        return before in steps and (*steps, None)[steps.index(before) + 1] == timestep

    def _begin(self, before: float, timestep: float) -> None:
        """Forget all features; say so where the sampler leaves out steps, and not only begins again."""
        of_pipeline, self._of_pipeline = self._of_pipeline, False
        self._kept = {}
        left_out = sum(timestep < t < before for t in self.plan.timesteps)
        if not left_out:
            return
        if of_pipeline and {before, timestep} <= set(self.plan.timesteps):
            self.now = None
            raise OctavoError(
                f"reuse plan: is for {self.plan.num_steps} steps, of which this run leaves out {left_out} between the "
                f"timesteps {before:g} and {timestep:g}; make a plan for its own steps (octavo reuse --steps)"
            )
        self._warn(
            f"{left_out} of its {self.plan.num_steps} steps are left out between the timesteps {before:g} and "
            f"{timestep:g}; features are forgotten there (make a plan for these steps)"
        )

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("reuse plan: %s", what)

    def keep(self, shapes: Shapes, deep: torch.Tensor) -> None:
        """Keep deep features of this call if its timestep is one at which the plan computes them."""
        assert self.now is not None
        if self.now not in self.plan.timesteps or self.plan.sources(self.now):
            return
        if self.place == 0:
            newest = list(self._kept)[-self.plan.order :] if self.plan.order else []
            self._kept = {**{t: self._kept[t] for t in newest}, self.now: []}
        if self.place < MOST_PLACES:
            self._kept[self.now].append((shapes, deep))

    def features(self, shapes: Shapes) -> dict[float, torch.Tensor]:
        """Those that this call may take, by timestep, the newest first; none where the whole network is computed."""
        found: dict[float, torch.Tensor] = {}
        assert self.now is not None
        for source in self.plan.sources(self.now):
            places = self._kept.get(source, [])
            if self.place >= len(places) or places[self.place][0] != shapes:
                break
            found[source] = places[self.place][1]
        return found

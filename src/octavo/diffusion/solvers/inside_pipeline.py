"""A solver that chooses its times as it goes, inside a pipeline, with what that does around its network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from numpy.typing import NDArray
from torch import Tensor

from octavo.diffusion.run import call_pipeline
from octavo.diffusion.trajectories.bound import remade
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Solving = Generator[tuple[float, Tensor], Tensor, Tensor]
"""Yields the real timestep t and the state x_t at which the network is to be evaluated, is sent the prediction there,
and returns the final state. Its first evaluation is that of x_T at t = T - 1."""
Solver = Callable[[Tensor, torch.Generator], Solving]
"""Begins at x_T [1, C, ...] of one image, with the image's generator, from which x_T has been drawn."""


@dataclass(frozen=True, eq=False)
class Solved:
    """What a solver made.

    images       as the pipeline gives them: float32 [N, height, width, channels] in [0, 1].
    evaluations  of the network, for each image, one after the other.
    """

    images: NDArray[np.float32]
    evaluations: tuple[int, ...]


def check_tolerances(rtol: float, atol: float) -> None:
    """Raise `OctavoError` unless both are above 0 and at most 1."""
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not 0 < value <= 1:
            raise OctavoError(f"{name}: {value!r} is not above 0 and at most 1")


def solve_inside(
    pipeline: DiffusionPipeline,
    solver: Solver,
    *,
    generators: Sequence[torch.Generator],
    inputs: Mapping[str, Any] | None = None,
    first_image: int = 0,
    max_evaluations: int = 10_000,
    on_image: Callable[[], None] = lambda: None,
) -> Solved:
    """An image for each generator, one after the other, so that none's steps depend on another's.

    The pipeline believes that it samples: it draws x_T, calls its network at the timesteps and states that the solver
    asks for (twice with guidance, if it does that), and decodes the solver's final state. States are those of a
    variance-preserving schedule, whatever the pipeline's own solver makes of them. `pipeline` stays as it was. Raises
    `OctavoError` for an image that takes more than `max_evaluations`.
    """
    images, evaluations = [], []
    for k, generator in enumerate(generators):
        own = copy.copy(pipeline)
        own.scheduler = remade(_Asking, pipeline.scheduler)
        own.scheduler.plan(solver, generator, max_evaluations)
        try:
            image = call_pipeline(
                own,
                generators=[generator],
                num_inference_steps=1,
                inputs=inputs,
                output_type="np",
                first_image=first_image + k,
            )
        finally:
            own.scheduler.close()
        images.append(np.asarray(image, dtype=np.float32))
        evaluations.append(own.scheduler.evaluations)
        on_image()
    if not images:
        raise OctavoError("generators: there is none; give one for each image")
    return Solved(np.concatenate(images), tuple(evaluations))


class _Asking(DDPMScheduler):
    """A scheduler that goes where its solver asks it to; it never leaves `solve_inside`."""

    def plan(self, solver: Solver, generator: torch.Generator, max_evaluations: int) -> None:
        self._solver, self._generator, self._max_evaluations = solver, generator, max_evaluations
        self._solving: Solving | None = None
        self.evaluations = 0

    def close(self) -> None:
        if self._solving is not None:
            self._solving.close()

    def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, **_: Any) -> None:
        self.num_inference_steps = 1
        self.following: float | None = float(self.config.num_train_timesteps - 1)
        timesteps: Any = _Timesteps([self.following]).to(device)
        timesteps.scheduler = self
        self.timesteps = timesteps

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        eta: Any = 0.0,
        **_: Any,
    ) -> Any:
        repeats = len(sample)  # a guided batch has the image more than once
        self.evaluations += 1
        if self.evaluations > self._max_evaluations:
            raise OctavoError(
                f"max_evaluations: the solver has not ended after {self._max_evaluations:,} evaluations of the "
                "network; give larger tolerances, or more evaluations"
            )
        if self._solving is None:
            self._solving = self._solver(sample[:1], self._generator)
            next(self._solving)  # asks for what has just been evaluated
        try:
            self.following, state = self._solving.send(model_output[:1])
        except StopIteration as end:
            self.following, state = None, end.value
        return SchedulerOutput(prev_sample=torch.cat([state.to(sample)] * repeats))


class _Timesteps(Tensor):
    """Timesteps of which a pipeline's loop gets one after the other, until there is none to follow."""

    scheduler: Any

    def __iter__(self) -> Iterator[Tensor]:
        while self.scheduler.following is not None:
            yield torch.tensor(self.scheduler.following, dtype=torch.float32, device=self.device)

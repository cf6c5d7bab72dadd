"""Run a pipeline's network at any timesteps and states, with what the pipeline does around it (guidance, prompts)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from octavo.diffusion.capture import probe
from octavo.diffusion.run import call_pipeline
from octavo.diffusion.trajectories.bound import remade
from octavo.diffusion.trajectories.use import steps_of
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

BY_FORMULA = "take a spacing by formula, such as trailing, or strength=1"
"""What to do where timesteps cannot be searched."""
OnPrediction = Callable[[int, Tensor, Tensor], Tensor | None]


def visit(
    pipeline: DiffusionPipeline,
    timesteps: Sequence[int],
    on_prediction: OnPrediction,
    *,
    generators: Sequence[torch.Generator],
    inputs: Mapping[str, Any] | None = None,
    first_image: int = 0,
) -> None:
    """Let the pipeline run over `timesteps`, in any order, from whatever state is wanted at each.

    The pipeline believes that it samples: it draws x_T, and at step i calls its network at timesteps[i], once or, with
    guidance, as often as it does that. `on_prediction(i, prediction, state)` gets what it made of it (as a scheduler's
    `step` does) and the state that it was made at, both [N, C, ...] for N generators, and returns the state of step
    i + 1; None ends the run, as does the last step. A pipeline that steps a guided batch (each image twice, as DiT's
    does) shows its first half, and gets what is returned twice. States are those of a variance-preserving schedule,
    x_t = sqrt(abar) x_0 + ..., whatever the pipeline's own solver makes of them. No final image is decoded. `pipeline`
    stays as it was.
    """
    own = copy.copy(pipeline)
    own.scheduler = remade(_Visiting, pipeline.scheduler)
    own.scheduler.plan(list(timesteps), on_prediction, len(generators))
    try:
        call_pipeline(
            own,
            generators=generators,
            num_inference_steps=len(timesteps),
            inputs=inputs,
            output_type="pt",
            first_image=first_image,
        )
    except _Visited:
        getattr(own, "maybe_free_model_hooks", lambda: None)()
        return
    raise OctavoError(f"pipeline: {type(pipeline).__name__} does not step through its scheduler's timesteps")


def check_visits_all(
    pipeline: DiffusionPipeline, inputs: Mapping[str, Any] | None, mend: str = "give strength=1"
) -> None:
    """Raise `OctavoError`, which ends with `mend`, where the pipeline's run leaves out timesteps of its scheduler.

    An image-to-image run does (`strength` below 1), and so cannot `visit` what it is told to. One call is begun, and
    stopped before the network's first evaluation.
    """
    found = probe(pipeline, num_inference_steps=steps_of(pipeline, 10), inputs=inputs)
    if found.skipped:
        raise OctavoError(
            f"inputs: {type(pipeline).__name__} leaves out {found.skipped} of {found.num_steps + found.skipped} steps "
            f"with these (strength, denoising_end), but every timestep must be visited; {mend}"
        )


class _Visited(BaseException):
    """Ends the pipeline's run. Not an Exception, so that no `except Exception` in a pipeline swallows it."""


class _Visiting(DDPMScheduler):
    """A scheduler that goes where it is told; it never leaves `visit`."""

    any_number_of_steps = True

    def plan(self, timesteps: list[int], on_prediction: OnPrediction, num_images: int) -> None:
        self._plan, self._on_prediction, self._index = timesteps, on_prediction, 0
        self._num_images = num_images

    def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, **_: Any) -> None:
        self.num_inference_steps = len(self._plan)
        self.timesteps = torch.tensor(self._plan, device=device)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        eta: Any = 0.0,
        **_: Any,
    ) -> Any:
        own = slice(self._num_images)
        following = self._on_prediction(self._index, model_output[own], sample[own])
        self._index += 1
        if following is None or self._index == len(self._plan):
            raise _Visited
        return SchedulerOutput(prev_sample=torch.cat([following] * (len(sample) // self._num_images)))

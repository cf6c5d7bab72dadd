"""Images that the model makes itself, as the states they end in: what costs are measured on without data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from octavo.diffusion.trajectories.schedule import NoiseSchedule
from octavo.diffusion.trajectories.spacings import evenly
from octavo.diffusion.trajectories.visit import visit

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def own_images(
    pipeline: DiffusionPipeline,
    schedule: NoiseSchedule,
    *,
    steps: int,
    generators: Sequence[torch.Generator],
    inputs: Mapping[str, Any] | None = None,
    first_image: int = 0,
) -> Tensor:
    """x_0 of one image for each generator, [N, C, ...] float32 on the CPU: DDIM (eta = 0) over evenly spaced timesteps.

    The last state as it is: pixels in [-1, 1], or latents that nothing has decoded. `steps` evaluations of the network
    for each image; the scheduler of `pipeline` gives its noise schedule and nothing else.
    """
    order = evenly(schedule.num_train_timesteps, steps)[::-1]
    last: list[Tensor] = []

    def on_prediction(index: int, prediction: Tensor, state: Tensor) -> Tensor:
        image, eps = schedule.split(prediction, state, order[index])
        following = order[index + 1] if index + 1 < len(order) else None
        last[:] = [schedule.jump(image, eps, following)]
        return last[0]

    visit(pipeline, order, on_prediction, generators=generators, inputs=inputs, first_image=first_image)
    return last[0].detach().to("cpu", torch.float32)

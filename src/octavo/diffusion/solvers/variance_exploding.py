"""Predictor-corrector sampling of a variance-exploding model (score SDE) by diffusers' scheduler, image by image."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor


def step_name(scheduler: Any) -> str:
    """The method that ends each of the sampler's iterations: `step`, or `step_pred` of diffusers' ScoreSdeVeScheduler.

    >>> from diffusers import DDIMScheduler, ScoreSdeVeScheduler
    >>> step_name(DDIMScheduler()), step_name(ScoreSdeVeScheduler())
    ('step', 'step_pred')
    """
    return "step" if hasattr(scheduler, "step") or not hasattr(scheduler, "step_pred") else "step_pred"


@contextmanager
def corrected_by_image(scheduler: Any) -> Iterator[None]:
    """Within the block the Langevin corrector's step size is each image's own; other schedulers stay as they are.

    Diffusers' `ScoreSdeVeScheduler.step_correct` is, with the score s = the network's output and z ~ N(0, I),

        x <- x + e s + sqrt(2 e) z,     e = 2 (snr mean_n || z_n || / mean_n || s_n ||)^2

    with means over the batch, so that an image depends on those beside it. Here the same method is called for each
    image alone, with its own generator: what a batch of one gives, bit for bit. Source: score SDE (2011.13456),
    algorithm 4, in which there is one image.
    """
    if not hasattr(scheduler, "step_correct") or step_name(scheduler) == "step":
        yield
        return
    together = scheduler.step_correct

    @functools.wraps(together)
    def by_image(
        model_output: Tensor, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> Any:
        following = []
        for k in range(len(sample)):
            own = generator[k] if isinstance(generator, list) else generator
            following += together(model_output[k : k + 1], sample[k : k + 1], own, return_dict=False)
        state = torch.cat(following)
        return SchedulerOutput(prev_sample=state) if return_dict else (state,)

    scheduler.step_correct = by_image
    try:
        yield
    finally:
        del scheduler.step_correct

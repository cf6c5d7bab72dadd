"""Diffusers schedulers as an unconditional pipeline drives them: unit noise at the start, a generator for each step.

DDIMPipeline and DDPMPipeline begin at x_T ~ N(0, I), hand the network x_t as it is, and give `step` a generator. Some
schedulers do not fit that, and would fail or, worse, sample noise in silence:

Euler, Euler ancestral, Heun   compute with y_t = x_t / sqrt(abar_t), whose variance grows with the noise; they leave it
                               to the pipeline to multiply its first noise by `init_noise_sigma`, and to ask
                               `scale_model_input` for what the network gets.
Heun, DEIS, UniPC, PNDM        take no generator.

Each class here is the diffusers scheduler of its name whose states outside are x_t = sqrt(abar_t) x_0 + sqrt(1 -
abar_t) eps, and which takes a generator. All else, the settings too, is the diffusers class's.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import (
    DEISMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from octavo.errors import OctavoError

FEWEST_OF_PNDM = 4
"""Steps of its Runge-Kutta start."""


class TakesGenerator:
    """A `step` that takes a generator and hands it on where the diffusers class wants one."""

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, **further: Any
    ) -> Any:
        """The diffusers class's `step`; a solver of the flow draws nothing and leaves the generator alone."""
        scheduler: Any = super()
        if "generator" in inspect.signature(scheduler.step).parameters:
            further["generator"] = generator
        return scheduler.step(model_output, timestep, sample, **further)


class KeepsVariance(TakesGenerator):
    """States outside are x_t, of unit variance at x_T; inside y_t = x_t sqrt(1 + sigma_t^2), as the solver has them.

    sigma_t = sqrt((1 - abar_t) / abar_t), the solver's own noise levels, so 1 + sigma_t^2 = 1 / abar_t.
    """

    @property
    def init_noise_sigma(self) -> float:
        """1: what the pipeline draws is x_T itself."""
        return 1.0

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """x_t as it is: that is what the network was trained on."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
        **further: Any,
    ) -> Any:
        """From x_t to the x of the next timestep, as the diffusers class steps from y to y."""
        scheduler: Any = super()
        own: Any = self
        scheduler.scale_model_input(sample, timestep)  # finds the index of its first step
        inside = sample * _growth(own.sigmas[own.step_index])
        result = scheduler.step(model_output, timestep, inside, generator=generator, **further)
        result.prev_sample = result.prev_sample / _growth(own.sigmas[own.step_index])
        return result if return_dict else result.to_tuple()

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """q(x_t | x_0): sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise."""
        scheduler: Any = super()
        sigma = scheduler.add_noise(torch.zeros_like(noise), torch.ones_like(noise), timesteps)
        return scheduler.add_noise(original_samples, noise, timesteps) / _growth(sigma)


def _growth(sigma: Tensor) -> Tensor:
    return (1 + sigma**2).sqrt()


class EulerDiscreteUnconditionalScheduler(KeepsVariance, EulerDiscreteScheduler):
    """`EulerDiscreteScheduler` for an unconditional pipeline: DDIM with eta = 0, whose x_0 is not clipped."""


class EulerAncestralDiscreteUnconditionalScheduler(KeepsVariance, EulerAncestralDiscreteScheduler):
    """`EulerAncestralDiscreteScheduler` for an unconditional pipeline."""


class HeunDiscreteUnconditionalScheduler(KeepsVariance, HeunDiscreteScheduler):
    """`HeunDiscreteScheduler` for an unconditional pipeline: 2 K - 1 evaluations."""


class DEISMultistepUnconditionalScheduler(TakesGenerator, DEISMultistepScheduler):
    """`DEISMultistepScheduler` for an unconditional pipeline."""


class UniPCMultistepUnconditionalScheduler(TakesGenerator, UniPCMultistepScheduler):
    """`UniPCMultistepScheduler` for an unconditional pipeline."""


class PNDMUnconditionalScheduler(TakesGenerator, PNDMScheduler):
    """`PNDMScheduler` for an unconditional pipeline: K + 9 evaluations, or K + 1 without its Runge-Kutta start."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """As the diffusers class. Raises `OctavoError` for fewer steps than its start has."""
        if num_inference_steps < FEWEST_OF_PNDM:
            raise OctavoError(
                f"num_inference_steps: PNDM begins with {FEWEST_OF_PNDM} steps of Runge-Kutta; "
                f"{num_inference_steps} are too few"
            )
        super().set_timesteps(num_inference_steps, device)


UNCONDITIONAL: dict[str, Any] = {
    adapter.__bases__[1].__name__: adapter
    for adapter in (
        DEISMultistepUnconditionalScheduler,
        EulerAncestralDiscreteUnconditionalScheduler,
        EulerDiscreteUnconditionalScheduler,
        HeunDiscreteUnconditionalScheduler,
        PNDMUnconditionalScheduler,
        UniPCMultistepUnconditionalScheduler,
    )
}
"""Diffusers' class -> ours."""

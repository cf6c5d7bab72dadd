"""A noise schedule between its timesteps: what solvers need that choose their own times."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from octavo.diffusion.trajectories.schedule import Floats, NoiseSchedule, noise_schedule

LEAST_ALPHA_BAR = 1e-12
"""Taken for an alpha-bar of 0 (zero terminal SNR), whose log sigma is infinite."""


@dataclass(frozen=True, eq=False)
class ContinuousSchedule:
    """abar_t for any real t in 0 .. T - 1, and what the network predicts there.

    sigma_t = sqrt((1 - abar_t) / abar_t), the noise in units of the signal. Between timesteps log sigma is linear in t,
    so that t(sigma) is its exact inverse. The network is told that real number t, not the nearest timestep: what it
    makes of t is a smooth function (sines), and to a solver that estimates its own error a jump from one timestep to
    the next looks like an error at whatever step size.

    Predicted images are not clipped, whether or not the sampler clips: what is solved is the equation of the network
    itself. DDIM that clips x_0 and keeps eps goes to no limit as its steps grow shorter, since each of them moves the
    state by as much as was clipped.
    """

    discrete: NoiseSchedule
    log_sigmas: Floats

    @property
    def last(self) -> float:
        """T - 1, the noisiest timestep."""
        return float(self.discrete.num_train_timesteps - 1)

    def log_sigma(self, timestep: float) -> float:
        return float(np.interp(timestep, np.arange(len(self.log_sigmas)), self.log_sigmas))

    def timestep(self, log_sigma: float) -> float:
        """The real timestep whose log sigma this is; the first or last one beyond them."""
        return float(np.interp(log_sigma, self.log_sigmas, np.arange(len(self.log_sigmas))))

    def alpha_bar(self, timestep: float) -> float:
        """abar = 1 / (1 + sigma^2)."""
        return float(1 / (1 + np.exp(2 * self.log_sigma(timestep))))

    def split(self, prediction: Tensor, state: Tensor, timestep: float) -> tuple[Tensor, Tensor]:
        """The prediction at x_t as (x_0, eps): `NoiseSchedule.split` for a real t."""
        here = replace(self.discrete, alpha_bars=np.array([self.alpha_bar(timestep)]))
        return here.split(prediction, state, 0)

    def image(self, prediction: Tensor, state: Tensor) -> Tensor:
        """The last jump, DDIM's from timestep 0 to the image, given the prediction at timestep 0."""
        return self.discrete.jump(*self.split(prediction, state, 0.0), None)


def continuous_schedule(scheduler: Any) -> ContinuousSchedule:
    """The schedule of a diffusers scheduler. Raises `OctavoError` for one that `noise_schedule` does not take.

    >>> from diffusers import DDIMScheduler
    >>> schedule = continuous_schedule(DDIMScheduler())
    >>> round(schedule.timestep(schedule.log_sigma(123.4)), 6)
    123.4
    """
    discrete = replace(noise_schedule(scheduler), clip=None)
    alpha_bars = np.maximum(discrete.alpha_bars, LEAST_ALPHA_BAR)
    return ContinuousSchedule(discrete, 0.5 * np.log((1 - alpha_bars) / alpha_bars))

"""A diffusers scheduler that samples with optimal variances: DDPM or DDIM's mean, Analytic-DPM's noise."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from octavo.diffusion.analytic.gamma import check_table, interpolated
from octavo.diffusion.analytic.variance import (
    LARGEST,
    LAST_NOISE,
    check_kind,
    forward_variances,
    trajectory_variances,
)
from octavo.diffusion.trajectories.bound import VisitsTrajectory
from octavo.diffusion.trajectories.schedule import Floats, noise_schedule
from octavo.diffusion.trajectories.schedulers import OWN_ADAPTERS
from octavo.errors import OctavoError


class AnalyticScheduler(DDPMScheduler):
    """`DDPMScheduler` whose variances are the optimal ones of the timesteps that it visits, whichever these are.

    Settings besides DDPM's, which stay what they are (its `variance_type` alone has no effect):

    kind              "ddpm": the mean is DDPM's. "ddim": it is DDIM's with eta = 0, with noise where DDIM has none.
    gamma_timesteps, gamma  ascending timesteps and Gamma at each; between them see `gamma.interpolated`.
    last_noise        y: mean size of the last noise at most, in levels of 8 bits; None: it is not clipped.
    largest_variance  of x_0 given x_t: ((b - a) / 2)^2 where the data are in [a, b].

    A network's second half of channels (a learned variance) is not looked at. The last jump goes to the image, where
    abar = 1, without noise. Source: Bao et al. (2201.06503), see `octavo.diffusion.analytic.variance`.
    """

    def __init__(
        self,
        *args: Any,
        kind: str = "ddpm",
        gamma_timesteps: Sequence[int] = (),
        gamma: Sequence[float] = (),
        last_noise: float | None = LAST_NOISE,
        largest_variance: float = LARGEST,
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        check_kind(kind)
        check_table(gamma_timesteps, gamma, self.config.num_train_timesteps)
        for name, value in (("last_noise", last_noise), ("largest_variance", largest_variance)):
            if value is None and name == "last_noise":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise OctavoError(f"{name}: {value!r} is not a number from 0")
        self._schedule = noise_schedule(self)
        self.register_to_config(
            kind=kind,
            gamma_timesteps=list(gamma_timesteps),
            gamma=list(gamma),
            last_noise=last_noise,
            largest_variance=largest_variance,
        )
        self._jumps: dict[int, tuple[float, float, float]] | None = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Set the timesteps to visit, as `DDPMScheduler` does, and the variances of the jumps between them."""
        super().set_timesteps(num_inference_steps, device, timesteps)
        self._jumps = None

    def variances(self) -> Floats:
        """The variance of the noise added after each of the timesteps that are set, float64 [K]; the last is 0."""
        timesteps = [int(t) for t in self.timesteps]
        alpha_bars = self._schedule.alpha_bars
        own = self.config
        gamma = interpolated(own.gamma_timesteps, own.gamma, timesteps, alpha_bars)
        return trajectory_variances(
            alpha_bars,
            timesteps,
            gamma,
            own.kind,
            largest=own.largest_variance,
            last_noise=own.last_noise,
        )

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """x_s from x_t (`sample`, [N, C, ...]) and the network's output at t, [N, C, ...] or [N, 2 C, ...].

            ddpm  sqrt(abar_s) x_0 + sqrt(1 - abar_s - lambda^2) eps + sigma* z,  eps of x_t and x_0, which is clipped
            ddim  sqrt(abar_s) x_0 + sqrt(1 - abar_s) eps + sigma* z,             eps the network's, x_0 clipped

        `generator`: one, or one for each image. z is drawn after every timestep but the last, as DDPM draws it.
        """
        t = int(timestep)
        if self._jumps is None:
            self._jumps = self._coefficients()
        if t not in self._jumps:
            raise OctavoError(f"timestep: {t} is not one of those that are set")
        of_image, of_other, deviation = self._jumps[t]
        image, eps = self._schedule.split(model_output, sample, t)
        following = of_image * image + of_other * (sample if self.config.kind == "ddpm" else eps)
        if t != int(self.timesteps[-1]):
            noise = randn_tensor(
                following.shape, generator=generator, device=following.device, dtype=following.dtype
            )
            following = following + deviation * noise
        if not return_dict:
            return following, image
        return DDPMSchedulerOutput(prev_sample=following, pred_original_sample=image)

    def _coefficients(self) -> dict[int, tuple[float, float, float]]:
        """Timestep -> what x_0, and x_t (ddpm) or eps (ddim), are multiplied with, and sigma*."""
        timesteps = [int(t) for t in self.timesteps]
        now = self._schedule.alpha_bars[timesteps]
        then = np.append(now[1:], 1.0)
        of_noise = np.sqrt(np.maximum(1 - then - forward_variances(now, then, self.config.kind), 0.0))
        if self.config.kind == "ddpm":
            of_other = of_noise / np.sqrt(1 - now)
            of_image = np.sqrt(then) - of_other * np.sqrt(now)
        else:
            of_image, of_other = np.sqrt(then), of_noise
        deviations = np.sqrt(self.variances())
        rows = zip(of_image.tolist(), of_other.tolist(), deviations.tolist(), strict=True)
        return dict(zip(timesteps, rows, strict=True))


def _settings_of(own: Any, base: Any) -> inspect.Signature:
    """Diffusers reads from `__init__`'s signature which settings a scheduler has: the base's, and our own."""
    named = [p for p in inspect.signature(own).parameters.values() if p.kind is p.KEYWORD_ONLY]
    theirs = inspect.signature(base)
    return theirs.replace(parameters=[*theirs.parameters.values(), *named])


AnalyticScheduler.__init__.__signature__ = _settings_of(  # type: ignore[attr-defined]
    AnalyticScheduler.__init__, DDPMScheduler.__init__
)


class AnalyticTrajectoryScheduler(VisitsTrajectory, AnalyticScheduler):
    """`AnalyticScheduler` on a trajectory."""


OWN_ADAPTERS[AnalyticScheduler.__name__] = AnalyticTrajectoryScheduler

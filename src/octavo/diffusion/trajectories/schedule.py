"""A model's noise schedule and what its predictions mean: all that costs of trajectories are computed from."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from octavo.diffusion.trajectories.trajectory import PREDICTION_TYPES
from octavo.errors import OctavoError

Floats = NDArray[np.float64]
DIGEST_SIZE = 9
DIGEST_RTOL, DIGEST_ATOL = 1e-4, 2e-6
"""Schedulers compute one schedule's abar with rounding of their own, and some have 6e-8 where others have 0."""


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps: abar, and what the network predicts of it.

    alpha_bars       float64 [T], falling.
    prediction_type  "epsilon", "v_prediction" or "sample".
    clip             predicted images are clipped to [-clip, clip], as the sampler does; None: it does not.
    final_alpha_bar  abar that the sampler's last jump goes to: 1, or abar_0 (`set_alpha_to_one=False`).
    steps_offset     what diffusers adds to the timesteps of its "leading" spacing.
    """

    alpha_bars: Floats
    prediction_type: str = "epsilon"
    clip: float | None = None
    final_alpha_bar: float = 1.0
    steps_offset: int = 0

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alpha_bars)

    @property
    def digest(self) -> tuple[float, ...]:
        """abar at DIGEST_SIZE timesteps, evenly spaced with both ends (or at all of fewer), to 6 digits.

        What another schedule is told by. Numbers that are compared, not a hash, whose every bit would have to agree.
        """
        last = self.num_train_timesteps - 1
        places = np.unique(np.linspace(0, last, min(DIGEST_SIZE, last + 1)).round().astype(int))
        return tuple(float(f"{abar:.6g}") for abar in self.alpha_bars[places])

    def split(self, prediction: Tensor, state: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        """The network's prediction at x_t as (x_0, eps), both as DDIM uses them: x_0 clipped, eps not made anew.

        epsilon       x_0 = (x_t - sqrt(1 - abar) p) / sqrt(abar),   eps = p
        sample        x_0 = p,                                       eps = (x_t - sqrt(abar) p) / sqrt(1 - abar)
        v_prediction  x_0 = sqrt(abar) x_t - sqrt(1 - abar) p,       eps = sqrt(abar) p + sqrt(1 - abar) x_t

        prediction: [N, C, ...] or, with a learned variance, [N, 2 C, ...], of which the first half is taken; state:
        x_t [N, C, ...]. Source: DDIM (2010.02502), equations 9 and 12; Salimans & Ho (2202.00512), appendix D for v.
        """
        channels = state.shape[1]
        prediction = prediction[:, :channels] if prediction.shape[1] == 2 * channels else prediction
        signal, noise = self.alpha_bars[timestep] ** 0.5, (1 - self.alpha_bars[timestep]) ** 0.5
        if self.prediction_type == "epsilon":
            image, eps = (state - noise * prediction) / signal, prediction
        elif self.prediction_type == "sample":
            image, eps = prediction, (state - signal * prediction) / noise
        else:
            image, eps = signal * state - noise * prediction, signal * prediction + noise * state
        return (image if self.clip is None else image.clamp(-self.clip, self.clip)), eps

    def noised(self, image: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """q(x_t | x_0): sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise."""
        signal = self.alpha_bars[timestep]
        return signal**0.5 * image + (1 - signal) ** 0.5 * noise

    def jump(self, image: Tensor, eps: Tensor, timestep: int | None) -> Tensor:
        """DDIM with eta = 0 (2010.02502, equation 12): the state at `timestep`, or behind the last where it is None."""
        signal = self.final_alpha_bar if timestep is None else self.alpha_bars[timestep]
        return signal**0.5 * image + (1 - signal) ** 0.5 * eps


def noise_schedule(scheduler: Any) -> NoiseSchedule:
    """The schedule of a diffusers scheduler, whichever solver that is.

    Raises `OctavoError` for one that has no alpha-bars of discrete timesteps (flow matching, EDM, Euler whose network
    is told the noise level), or an unknown prediction type.

    >>> from diffusers import DDIMScheduler
    >>> noise_schedule(DDIMScheduler(num_train_timesteps=10)).alpha_bars[0].round(4)
    np.float64(0.9999)
    """
    name, config = type(scheduler).__name__, scheduler.config
    alpha_bars = getattr(scheduler, "alphas_cumprod", None)
    if alpha_bars is None or config.get("use_flow_sigmas", False):
        raise OctavoError(
            f"scheduler: {name} has no alpha-bars (alphas_cumprod) whose timesteps could be chosen"
        )
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise OctavoError(
            f"scheduler: prediction_type {prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}"
        )
    continuous = config.get("timestep_type") == "continuous" and prediction_type == "v_prediction"
    if continuous and _has_setting(scheduler, "timestep_type"):
        raise OctavoError(
            f"scheduler: {name} tells the network noise levels (timestep_type continuous), not timesteps that could be "
            "chosen"
        )
    if config.get("thresholding", False):
        raise OctavoError(
            "scheduler: its dynamic thresholding is not supported here; set thresholding to false"
        )
    final = getattr(scheduler, "final_alpha_cumprod", None)
    return NoiseSchedule(
        np.asarray(alpha_bars.double().cpu()),
        prediction_type,
        _clip(scheduler),
        1.0 if final is None else float(final),
        int(config.get("steps_offset", 0)),
    )


def _clip(scheduler: Any) -> float | None:
    """The range that the scheduler clips predicted images to, if it does.

    Diffusers keeps the settings of the class that a scheduler was made from, whatever its own class makes of them:
    UniPC made from DDIM has `clip_sample` in its configuration, and does not clip.
    """
    clips = getattr(scheduler, "clips_images", True) and _has_setting(scheduler, "clip_sample")
    config = scheduler.config
    return float(config.get("clip_sample_range", 1.0)) if clips and config.get("clip_sample", False) else None


def _has_setting(scheduler: Any, name: str) -> bool:
    """Whether the scheduler's class, or one that it is made of, has a setting of this name."""
    kinds: Any = type(scheduler).__mro__
    return any(name in inspect.signature(kind.__init__).parameters for kind in kinds)


class MadeForSchedule(Protocol):
    """What was found for one model's schedule, and says so."""

    @property
    def num_train_timesteps(self) -> int: ...
    @property
    def prediction_type(self) -> str: ...
    @property
    def alpha_bars(self) -> tuple[float, ...] | None: ...


def check_schedule(scheduler: Any, found: MadeForSchedule, name: str, mend: str) -> None:
    """Raise `OctavoError`, which begins with `name` and ends with `mend`, unless `found` is for such a scheduler."""
    schedule = noise_schedule(scheduler)
    if found.prediction_type != schedule.prediction_type:
        raise OctavoError(
            f"{name}: is for a model of prediction type {found.prediction_type!r}, this one's is "
            f"{schedule.prediction_type!r}; {mend}"
        )
    if found.num_train_timesteps != schedule.num_train_timesteps:
        raise OctavoError(
            f"{name}: is for {found.num_train_timesteps} training timesteps, the scheduler has "
            f"{schedule.num_train_timesteps}; {mend}"
        )
    theirs, ours = found.alpha_bars, schedule.digest
    if theirs is not None and not (
        len(theirs) == len(ours) and np.allclose(theirs, ours, DIGEST_RTOL, DIGEST_ATOL)
    ):
        raise OctavoError(f"{name}: is for another noise schedule (other betas) than this model's; {mend}")

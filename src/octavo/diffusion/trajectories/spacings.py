"""Spacings by formula or table: K of T timesteps, chosen without looking at the model's images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from octavo.diffusion.trajectories.schedule import Floats, NoiseSchedule, noise_schedule
from octavo.diffusion.trajectories.schedulers import lowest_timestep
from octavo.diffusion.trajectories.trajectory import Trajectory
from octavo.errors import OctavoError

Spacing = Callable[[NoiseSchedule, int], Floats]
AYS_TABLES = {"ays_sd": "StableDiffusionTimesteps", "ays_sdxl": "StableDiffusionXLTimesteps"}
OF_NOISE_LEVELS = ("karras", "beta", *AYS_TABLES)
"""Spacings whose timesteps depend on the schedule's alpha-bars, or were published for one."""
KARRAS_RHO = 7.0
BETA_SHAPE = 0.6


def spaced(scheduler: Any, name: str, steps: int) -> Trajectory:
    """The trajectory of `steps` timesteps that the spacing `name` makes of the scheduler's noise schedule.

    leading, trailing, linspace   diffusers' three linear ones (2305.08891, table 2); "linear" is "leading".
    quadratic                     t_i = 0.8 T (i / (K - 1))^2, the quadratic one of DDIM (2010.02502, appendix D.2), up
                                  to 0.8 T as its code has it; that code cuts to whole timesteps, here they are rounded
                                  (484 for 483).
    karras                        noise levels sigma with sigma^(1/7) evenly spaced (2206.00364, equation 5).
    beta                          quantiles of Beta(0.6, 0.6) over noise levels (2407.12173), as diffusers does it.
    ays_sd, ays_sdxl              Align Your Steps' tables (2404.14507) of diffusers; for other than 10 steps the noise
                                  levels are interpolated log-linearly, as its authors say. Made for Stable Diffusion's
                                  schedules: on another they are a guess.

    The last four depend on the noise schedule, and their trajectories are refused on another; the first four are any's.
    Noise levels are turned into the nearest timesteps (in log sigma); those that coincide are moved apart, towards the
    noisy end where there is room, as is 0 in a solver that jumps there itself (DEIS). Raises `OctavoError` for an
    unknown name or a number of steps out of 1 .. T.

    >>> from diffusers import DDIMScheduler
    >>> spaced(DDIMScheduler(), "leading", 4).timesteps
    (750, 500, 250, 0)
    """
    schedule = noise_schedule(scheduler)
    if name not in SPACINGS:
        raise OctavoError(f"method: no spacing {name!r}; choose one of {', '.join(SPACINGS)}")
    lowest = lowest_timestep(scheduler)
    check_steps(steps, schedule.num_train_timesteps - lowest)
    timesteps = _distinct(SPACINGS[name](schedule, steps), schedule.num_train_timesteps, lowest)
    return Trajectory(
        timesteps,
        schedule.num_train_timesteps,
        schedule.prediction_type,
        name,
        alpha_bars=schedule.digest if name in OF_NOISE_LEVELS else None,
    )


def check_steps(steps: int, num_train_timesteps: int) -> None:
    """Raise `OctavoError` unless 1 <= steps <= T."""
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= num_train_timesteps:
        raise OctavoError(
            f"steps: {steps!r} is not a whole number from 1 to {num_train_timesteps}, the timesteps of the schedule"
        )


def evenly(num_train_timesteps: int, count: int, lowest: int = 0) -> tuple[int, ...]:
    """`count` candidate timesteps, ascending, evenly spaced from `lowest` to T - 1; all where there are no more.

    >>> evenly(1000, 5), evenly(3, 100)
    ((0, 250, 500, 749, 999), (0, 1, 2))
    """
    count = min(count, num_train_timesteps - lowest)
    if count == 1:
        return (num_train_timesteps - 1,)
    return tuple(int(t) for t in np.linspace(lowest, num_train_timesteps - 1, count).round())


def _leading(schedule: NoiseSchedule, steps: int) -> Floats:
    ratio = float(schedule.num_train_timesteps // steps)
    return np.arange(steps, dtype=np.float64)[::-1] * ratio + schedule.steps_offset


def _trailing(schedule: NoiseSchedule, steps: int) -> Floats:
    total = schedule.num_train_timesteps
    return np.round(total - np.arange(steps) * (total / steps)) - 1


def _linspace(schedule: NoiseSchedule, steps: int) -> Floats:
    if steps == 1:
        return np.array([schedule.num_train_timesteps - 1.0])
    return np.linspace(0, schedule.num_train_timesteps - 1, steps).round()[::-1]


def _quadratic(schedule: NoiseSchedule, steps: int) -> Floats:
    last = 0.8 * schedule.num_train_timesteps
    return (np.linspace(0, last**0.5, steps) ** 2)[::-1] if steps > 1 else np.array([last])


def _karras(schedule: NoiseSchedule, steps: int) -> Floats:
    low, high = _log_sigmas(schedule)[[0, -1]] / KARRAS_RHO
    return _nearest(schedule, np.log(np.linspace(np.exp(high), np.exp(low), steps)) * KARRAS_RHO)


def _beta(schedule: NoiseSchedule, steps: int) -> Floats:
    try:
        from scipy.stats import beta
    except ImportError as error:  # diffusers has it only where its user has
        raise OctavoError(
            "method: beta needs scipy (pip install scipy), or choose another spacing"
        ) from error

    low, high = np.exp(_log_sigmas(schedule)[[0, -1]])
    quantiles = beta.ppf(1 - np.linspace(0, 1, steps), BETA_SHAPE, BETA_SHAPE)
    return _nearest(schedule, np.log(low + quantiles * (high - low)))


def _align_your_steps(table: str) -> Spacing:
    def spacing(schedule: NoiseSchedule, steps: int) -> Floats:
        from diffusers.schedulers import AysSchedules

        published = np.array(AysSchedules[table], dtype=np.float64)
        if schedule.num_train_timesteps != 1000:
            raise OctavoError("method: Align Your Steps' tables are for schedules of 1000 timesteps")
        if steps == len(published):
            return published
        levels = _log_sigmas(schedule)[published.astype(int)]
        places = np.linspace(0, 1, len(published))
        return _nearest(schedule, np.interp(np.linspace(0, 1, steps), places, levels))

    return spacing


def _log_sigmas(schedule: NoiseSchedule) -> Floats:
    """log sqrt((1 - abar) / abar), float64 [T], rising; an abar of 0 (zero terminal SNR) is taken as 1e-12."""
    alpha_bars = np.maximum(schedule.alpha_bars, 1e-12)
    return 0.5 * np.log((1 - alpha_bars) / alpha_bars)


def _nearest(schedule: NoiseSchedule, log_sigmas: Floats) -> Floats:
    own = _log_sigmas(schedule)
    return np.interp(log_sigmas, own, np.arange(len(own)))


def _distinct(timesteps: Floats, num_train_timesteps: int, lowest: int) -> tuple[int, ...]:
    """Rounded, within lowest .. T - 1, strictly descending: each at least one above the next, none above its room."""
    ascending = np.clip(np.round(timesteps[::-1]), lowest, num_train_timesteps - 1).astype(np.int64)
    places = np.arange(len(ascending))
    apart = np.maximum.accumulate(ascending - places) + places
    room = num_train_timesteps - len(ascending) + places
    return tuple(int(t) for t in np.minimum(apart, room)[::-1])


SPACINGS: dict[str, Spacing] = {
    "linear": _leading,
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
    "quadratic": _quadratic,
    "karras": _karras,
    "beta": _beta,
    **{name: _align_your_steps(table) for name, table in AYS_TABLES.items()},
}

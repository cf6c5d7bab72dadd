"""What an error of the network's output at one step becomes in the final image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from octavo.diffusion.trajectories.schedule import Floats, noise_schedule


def output_weights(scheduler: Any, timesteps: Sequence[float], variance: float = 1.0) -> Floats:
    """float64 [K]: the factor by which an error of the output at step m reaches the image, step m + 1 following it.

    With x_t = a x_0 + s eps (a = sqrt(abar), s = sqrt(1 - abar); flow matching: a = 1 - sigma, s = sigma) and a step of
    DDIM (2010.02502, equation 12; flow matching: Euler's) to a', s', an error d of the prediction moves the state by

        (s' - a' s / a) d   epsilon          (s' a - a' s) d   v_prediction and flow matching
        (a' - s' a / s) d   sample

    and where the data are normal with variance c^2 the rest of the probability flow multiplies that by
    c / sqrt(a'^2 c^2 + s'^2), as in `octavo.diffusion.trajectories.reference`. Solvers of higher order do not step so;
    the weights are then a guess. variance: c^2.

    Raises `OctavoError` for a scheduler that has neither alpha-bars nor flow matching's sigmas.

    >>> from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
    >>> output_weights(FlowMatchEulerDiscreteScheduler(), [1000.0, 500.0]).round(3).tolist()
    [-0.707, -0.5]
    >>> output_weights(DDIMScheduler(), [900.0, 0.0]).round(3).tolist()
    [-60.809, -0.01]
    """
    prediction, signal, noise = _levels(scheduler, timesteps)
    a, s, after_a, after_s = signal[:-1], noise[:-1], signal[1:], noise[1:]
    moved = {
        "epsilon": lambda: after_s - after_a * s / a,
        "sample": lambda: after_a - after_s * a / s,
    }.get(prediction, lambda: after_s * a - after_a * s)()
    return np.asarray(moved * np.sqrt(variance / (after_a**2 * variance + after_s**2)))


def _levels(scheduler: Any, timesteps: Sequence[float]) -> tuple[str, Floats, Floats]:
    """What the network predicts, and a and s at each timestep and behind the last."""
    if "FlowMatch" in type(scheduler).__name__ or scheduler.config.get("use_flow_sigmas", False):
        sigmas = np.array([*timesteps, 0.0]) / scheduler.config.num_train_timesteps
        return "flow", 1 - sigmas, sigmas
    schedule = noise_schedule(scheduler)
    last = schedule.num_train_timesteps - 1
    indices = [min(max(round(t), 0), last) for t in timesteps]
    alpha_bars = np.array([*schedule.alpha_bars[indices], schedule.final_alpha_bar])
    return schedule.prediction_type, np.sqrt(alpha_bars), np.sqrt(1 - alpha_bars)

"""What a jump costs in likelihood: terms of the variational bound, one network evaluation at t for all jumps from t."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from octavo.diffusion.trajectories.schedule import Floats, NoiseSchedule
from octavo.diffusion.trajectories.visit import visit

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

EIGHT_BITS = (2 / 255) ** 2 / 12
"""Variance of rounding numbers in [-1, 1] to 8 bits: that of the last jump is not less."""


@dataclass(frozen=True, eq=False)
class ElboErrors:
    """Sums over images, of N candidate timesteps in ascending order.

    errors  float64 [N]: || x_0 - x0hat(x_t, t) ||^2, x_t ~ q(x_t | x_0).
    norm    || x_0 ||^2.
    images, dims  how many images, and numbers in each.
    """

    errors: Floats
    norm: float
    images: int
    dims: int

    def __add__(self, other: ElboErrors) -> ElboErrors:
        return ElboErrors(
            self.errors + other.errors, self.norm + other.norm, self.images + other.images, self.dims
        )


def elbo_jumps(
    errors: ElboErrors, schedule: NoiseSchedule, candidates: Sequence[int]
) -> tuple[Floats, Floats]:
    """F [N + 1, N + 1] and the start's cost [N] for `cheapest_paths`, in nats per image; their sum is minus the ELBO.

    With e_t = E || x_0 - x0hat(x_t, t) ||^2, of d numbers, and SNR = abar / (1 - abar),

        F[s, t]  = KL(q(x_s | x_t, x_0) || p(x_s | x_t)) = (SNR_s - SNR_t) e_t / 2
        F[0, t]  = -log p(x_0 | x_t) = d / 2 (e_t / (d v) + log(2 pi v)),   v = max(e_t / d, (2 / 255)^2 / 12)
        start[t] = KL(q(x_t | x_0) || N(0, I)) = (abar_t E || x_0 ||^2 - d abar_t - d log(1 - abar_t)) / 2

    p has the mean of q with x0hat in the place of x_0, and q's variance; the last jump has the variance of greatest
    likelihood, but not less than that of rounding to 8 bits. Sources: DDPM (2006.11239), equation 5; the KL's form is
    Variational Diffusion Models' (2107.00630), equation 13; the decomposition by pairs is Watson et al. (2106.03802).
    """
    dims = errors.dims
    mean = errors.errors / errors.images
    alpha_bars = schedule.alpha_bars[list(candidates)]
    snr = alpha_bars / (1 - alpha_bars)
    jumps = np.zeros((len(candidates) + 1, len(candidates) + 1))
    jumps[1:, 1:] = (snr[:, None] - snr[None, :]) * mean[None, :] / 2
    variance = np.maximum(mean / dims, EIGHT_BITS)
    jumps[0, 1:] = dims / 2 * (mean / dims / variance + np.log(2 * np.pi * variance))
    norm = errors.norm / errors.images
    start = (alpha_bars * norm - dims * alpha_bars - dims * np.log1p(-alpha_bars)) / 2
    return jumps, start


def measure_elbo(
    pipeline: DiffusionPipeline,
    schedule: NoiseSchedule,
    candidates: Sequence[int],
    images: Tensor,
    *,
    generators: Sequence[torch.Generator],
    inputs: Mapping[str, Any] | None = None,
    first_image: int = 0,
    on_evaluation: Callable[[], None] = lambda: None,
) -> ElboErrors:
    """The errors of one batch: images x_0 [N, C, ...], float32 on the CPU, and a generator for the noise of each.

    One evaluation of the batch at each candidate timestep, from the noisiest down, and one more, since a pipeline's
    first evaluation is of noise that it draws itself. x0hat is what the sampler makes of the prediction, clipped if it
    clips.
    """
    order = [candidates[-1], *reversed(candidates)]
    errors = np.zeros(len(candidates))

    def noised(timestep: int, like: Tensor) -> Tensor:
        noise = torch.stack([torch.randn(images.shape[1:], generator=generator) for generator in generators])
        return schedule.noised(images, noise, timestep).to(like)

    def on_prediction(index: int, prediction: Tensor, state: Tensor) -> Tensor | None:
        on_evaluation()
        if index > 0:
            image, _ = schedule.split(prediction, state, order[index])
            distance = (image.detach().cpu().double() - images).square().sum()
            errors[len(candidates) - index] = float(distance)
        return noised(order[index + 1], state) if index + 1 < len(order) else None

    visit(pipeline, order, on_prediction, generators=generators, inputs=inputs, first_image=first_image)
    return ElboErrors(errors, float(images.double().square().sum()), len(images), images[0].numel())

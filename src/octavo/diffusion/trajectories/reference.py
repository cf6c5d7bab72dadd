"""What a jump costs in distance to a fine reference trajectory: the image that the noise would end in."""

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


@dataclass(frozen=True, eq=False)
class ReferenceErrors:
    """Sums over images, of N candidate timesteps in ascending order behind node 0, the image.

    jumps         float64 [N + 1, N + 1]: squared distance of the state that one jump from t reaches at s, from the
                  reference's state there.
    start         float64 [N]: squared distance of the noise x_T, taken for x_t, from the reference's x_t.
    moments       the sum and the sum of squares of all numbers of the reference's final states.
    images, dims  how many images, and numbers in each.
    """

    jumps: Floats
    start: Floats
    moments: tuple[float, float]
    images: int
    dims: int

    def __add__(self, other: ReferenceErrors) -> ReferenceErrors:
        moments = self.moments[0] + other.moments[0], self.moments[1] + other.moments[1]
        return ReferenceErrors(
            self.jumps + other.jumps,
            self.start + other.start,
            moments,
            self.images + other.images,
            self.dims,
        )


def reference_jumps(
    errors: ReferenceErrors, schedule: NoiseSchedule, candidates: Sequence[int]
) -> tuple[Floats, Floats]:
    """F [N + 1, N + 1] and the start's cost [N] for `cheapest_paths`: mean squared errors as seen in the final image.

    F[s, t] = w_s / d E || DDIM(x_t, t -> s) - x_s ||^2 along the reference. The weight w_s is what the rest of the flow
    makes of a small error at s. Where the data are normal with variance c^2 in every direction, the probability flow
    maps x_s to x_0 by the factor c / sqrt(abar_s c^2 + 1 - abar_s), hence

        w_s = c^2 / (abar_s c^2 + 1 - abar_s)

    with c^2 the variance of the reference's final numbers; w is 1 at the image, and everywhere if c = 1. The data are
    not normal and later jumps are not the flow, so the sum is a guess of a trajectory's error, not a bound.
    """
    scale = errors.images * errors.dims
    mean, square = errors.moments[0] / scale, errors.moments[1] / scale
    variance = max(square - mean**2, 1e-12)
    alpha_bars = np.array([schedule.final_alpha_bar, *schedule.alpha_bars[list(candidates)]])
    weights = variance / (alpha_bars * variance + 1 - alpha_bars)
    return errors.jumps * weights[:, None] / scale, errors.start * weights[1:] / scale


def measure_reference(
    pipeline: DiffusionPipeline,
    schedule: NoiseSchedule,
    candidates: Sequence[int],
    *,
    generators: Sequence[torch.Generator],
    inputs: Mapping[str, Any] | None = None,
    first_image: int = 0,
    on_evaluation: Callable[[], None] = lambda: None,
) -> ReferenceErrors:
    """The errors of one batch, an image for each generator: one evaluation of the batch at each candidate timestep.

    The reference is DDIM with eta = 0 over all candidates, from the noisiest down. Its predictions at t give every jump
    from t. Memory: 3 states of the batch at each candidate, as float32, three times that while they are compared.
    """
    order = list(reversed(candidates))
    states: list[Tensor] = []
    images: list[Tensor] = []
    noises: list[Tensor] = []

    def on_prediction(index: int, prediction: Tensor, state: Tensor) -> Tensor | None:
        on_evaluation()
        image, eps = schedule.split(prediction, state, order[index])
        for kept, tensor in ((states, state), (images, image), (noises, eps)):
            kept.append(tensor.detach().float().cpu())
        last = index + 1 == len(order)
        following = schedule.jump(image, eps, None if last else order[index + 1])
        if last:
            states.append(following.detach().float().cpu())
        return None if last else following

    visit(pipeline, order, on_prediction, generators=generators, inputs=inputs, first_image=first_image)
    final, dims = states[-1].double(), states[-1][0].numel()
    moments = float(final.sum()), float(final.square().sum())
    visited, image, eps = (_rows(tensors[::-1]) for tensors in (states, images, noises))
    alpha_bars = np.array([schedule.final_alpha_bar, *schedule.alpha_bars[list(candidates)]])
    jumps = np.zeros((len(candidates) + 1, len(candidates) + 1))
    jumps[:, 1:] = _jump_errors(visited, image, eps, alpha_bars)
    start = np.square(visited[1:] - visited[-1]).sum(1)
    return ReferenceErrors(jumps, start, moments, len(generators), dims)


def _jump_errors(states: Floats, image: Floats, eps: Floats, alpha_bars: Floats) -> Floats:
    """|| sqrt(abar_s) image_t + sqrt(1 - abar_s) eps_t - state_s ||^2 for all s and t, by products of all with all.

    states: [N + 1, D]; image, eps: [N, D]; alpha_bars: [N + 1] => [N + 1, N]. Entries with s above t mean nothing.
    """
    signal, noise = np.sqrt(alpha_bars)[:, None], np.sqrt(1 - alpha_bars)[:, None]
    of_images, of_noises = np.square(image).sum(1), np.square(eps).sum(1)
    errors = signal**2 * of_images + noise**2 * of_noises + np.square(states).sum(1)[:, None]
    errors += 2 * signal * noise * np.einsum("td,td->t", image, eps)
    errors -= 2 * (signal * (states @ image.T) + noise * (states @ eps.T))
    return errors.clip(min=0.0)


def _rows(tensors: Sequence[Tensor]) -> Floats:
    """A row for each tensor, float64."""
    return np.asarray(torch.stack(list(tensors)).flatten(1).double())

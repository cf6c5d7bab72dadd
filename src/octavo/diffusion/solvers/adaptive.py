"""The reverse SDE solved with steps as long as an error estimate allows, image by image (2105.14080)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from octavo.diffusion.solvers.continuous import ContinuousSchedule, continuous_schedule
from octavo.diffusion.solvers.inside_pipeline import Solved, Solver, Solving, check_tolerances, solve_inside

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FIRST_STEP = 0.01
SAFETY = 0.9
EXPONENT = 0.9
"""h_init, theta and r of algorithm 1."""


def solve_adaptive(
    pipeline: DiffusionPipeline,
    *,
    generators: Sequence[torch.Generator],
    inputs: Mapping[str, Any] | None = None,
    rtol: float = 0.02,
    atol: float = 2 / 256,
    first_image: int = 0,
    max_evaluations: int = 10_000,
    on_image: Callable[[], None] = lambda: None,
) -> Solved:
    """An image for each generator: the reverse SDE from its noise, each image with step sizes of its own.

    Time u = t / (T - 1) runs from 1 to 0 in real timesteps t, see `ContinuousSchedule`; of the variance-preserving SDE
    f(x, u) = -beta(u) x / 2, g(u)^2 = beta(u) = -d log abar / du, with the score s = -eps / sqrt(1 - abar). A step of
    length h, with the same z ~ N(0, I) in both lines:

        x'  = x - h f(x, u) + h g(u)^2 s(x, u) + sqrt(h) g(u) z
        x~  = x - h f(x', u - h) + h g(u - h)^2 s(x', u - h) + sqrt(h) g(u - h) z
        x'' = (x' + x~) / 2
        E   = || (x' - x'') / max(atol, rtol max(|x'|, |x'_previous|)) || / sqrt(numbers of the image)

    It is made, to x'', where E <= 1, and else drawn and tried anew; then h <- min(u, 0.9 h / E^0.9), from h = 0.01. Two
    evaluations of the network for a step that is made, one for one that is not. `atol` is one of 256 levels of numbers
    in [-1, 1]; a larger `rtol` is faster. From timestep 0 DDIM's last jump gives the image; its evaluation counts too.

    Image k's noise is that of its generator alone, as many draws as it needs. Raises `OctavoError` for tolerances that
    are not positive, or where `max_evaluations` do not suffice. Source: 2105.14080, algorithm 1.
    """
    check_tolerances(rtol, atol)
    solver = _adaptive_solver(continuous_schedule(pipeline.scheduler), rtol, atol)
    return solve_inside(
        pipeline,
        solver,
        generators=generators,
        inputs=inputs,
        first_image=first_image,
        max_evaluations=max_evaluations,
        on_image=on_image,
    )


def _adaptive_solver(schedule: ContinuousSchedule, rtol: float, atol: float) -> Solver:
    timesteps = np.arange(len(schedule.log_sigmas))
    # abar = 1 / (1 + sigma^2); its logarithm's slope at whole timesteps, and linear between them
    betas = np.gradient(np.logaddexp(0, 2 * schedule.log_sigmas)) * schedule.last

    def drift(state: Tensor, prediction: Tensor, time: float) -> tuple[Tensor, float]:
        """g^2 s - f at a state, and g, of a prediction made there."""
        timestep = time * schedule.last
        beta = float(np.interp(timestep, timesteps, betas))
        _, eps = schedule.split(prediction.double().cpu(), state, timestep)
        score = -eps / (1 - schedule.alpha_bar(timestep)) ** 0.5
        return beta * (state / 2 + score), beta**0.5

    def solver(start: Tensor, generator: torch.Generator) -> Solving:
        state = previous = start.double().cpu()
        time, step = 1.0, FIRST_STEP
        here = drift(state, (yield time * schedule.last, state), time)
        while time > 0:
            z = torch.randn(state.shape, generator=generator, dtype=torch.float64)
            slope, growth = here
            low = state + step * slope + step**0.5 * growth * z
            after = time - step if step < time else 0.0
            slope, growth = drift(low, (yield after * schedule.last, low), after)
            high = (low + state + step * slope + step**0.5 * growth * z) / 2
            tolerance = (rtol * torch.maximum(low.abs(), previous.abs())).clamp(min=atol)
            error = float(((low - high) / tolerance).square().mean().sqrt())
            if error <= 1:
                time, state, previous = after, high, low
                if time > 0:
                    here = drift(state, (yield time * schedule.last, state), time)
            step = min(time, SAFETY * step * max(error, 1e-9) ** -EXPONENT)
        prediction = yield 0.0, state
        return schedule.image(prediction.double().cpu(), state)

    return solver

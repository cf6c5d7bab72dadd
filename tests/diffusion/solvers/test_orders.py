"""Every solver against the exact answer: at which order its error falls, or whether mean and variance are right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline

from octavo.diffusion.samplers import SOLVERS, with_scheduler
from octavo.diffusion.trajectories.bound import plain_config, plain_name
from octavo.diffusion.trajectories.schedulers import ADAPTERS

# diffusers' solvers, with NumPy 2
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]
ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "dpmsolver++": 2, "deis": 2, "unipc": 3, "pndm": 2}
"""As their papers have them; UniPC of solver order 2 is of order 3 with its corrector (2302.04867)."""
RANDOM = ("ddpm", "dpmsolver++sde", "euler_ancestral", "predictor_corrector")


def solver(unet: Any, name: str) -> Any:
    """The scheduler that an unconditional pipeline gets, without clipping, and with spacing to the very end."""
    own = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    scheduler = with_scheduler(DDPMPipeline(unet, own), name).scheduler
    if name != "pndm":
        assert scheduler.config.timestep_spacing == "trailing"
    return scheduler


def test_every_solver_is_measured_here() -> None:
    assert {*ORDERS, *RANDOM} == set(SOLVERS)


def error(unet: Any, hills: Any, name: str, steps: int) -> float:
    """The greatest error of 16 numbers, of size 1, in the state that `steps` even steps from t = 900 hand on at 100.

    PNDM's steps are T / `steps` long and begin at T; its state is that at t = 200.
    """
    scheduler = solver(unet, name)
    first, last = 900, 100
    if name == "pndm":
        scheduler.set_timesteps(steps)
        first, last = int(scheduler.timesteps[0]), 200
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()  # it takes differences of them
    else:
        nodes = np.linspace(first, last, steps + 1).round().astype(int).tolist()
        settings = {**plain_config(scheduler), "trajectory": nodes}
        scheduler = ADAPTERS[plain_name(scheduler)].from_config(settings)
        scheduler.set_timesteps(steps + 1)
    alpha_bars = scheduler.alphas_cumprod.double()
    start = torch.linspace(-2, 2, 16, dtype=torch.float64).reshape(1, 1, 4, 4)
    state, reached = start, start
    for t in scheduler.timesteps:
        if int(t) < last:
            break
        if int(t) == last:
            reached = state  # Heun is at each timestep twice: the second time is what it hands on
        noise = hills.noise(state, float(alpha_bars[int(t)]))
        state = scheduler.step(noise, t, state, generator=None).prev_sample
    exact = hills.flow(start, float(alpha_bars[first]), float(alpha_bars[last]))
    return float((reached - exact).abs().max())


@pytest.mark.parametrize("name", sorted(ORDERS))
def test_the_error_falls_at_the_order_of_the_solver(unet: Any, hills: Any, name: str) -> None:
    counts = (50, 100, 250) if name == "pndm" else (20, 40, 80)
    errors = [error(unet, hills, name, steps) for steps in counts]
    order = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    # UniPC is still on its way to 3: 2.5 here, 2.8 at 160 steps
    low, high = (2.3, 3.2) if name == "unipc" else (ORDERS[name] - 0.15, ORDERS[name] + 0.15)
    assert low < order < high, (errors, order)
    assert errors[-1] < (0.02 if ORDERS[name] == 1 else 7e-4)


@pytest.mark.parametrize("name", RANDOM)
def test_a_solver_with_noise_reaches_the_mean_and_the_variance(unet: Any, normal: Any, name: str) -> None:
    """Within sampling error at 500 steps; at 50 steps the variance is far off."""
    size = 10_000
    off = {}
    for steps in (50, 500):
        scheduler = solver(unet, name)
        scheduler.set_timesteps(steps)
        generator = torch.Generator().manual_seed(0)
        state = torch.randn(1, 1, size, 1, generator=generator)
        for t in scheduler.timesteps:
            noise = normal.noise(state, float(scheduler.alphas_cumprod[int(t)])).float()
            state = scheduler.step(noise, t, state, generator=generator).prev_sample
        numbers = state.double()
        assert abs(float(numbers.mean()) - 0.3) < 3.5 * 0.5 / size**0.5
        off[steps] = float(numbers.var()) / 0.5**2 - 1
    assert abs(off[500]) < 3.5 * (2 / size) ** 0.5
    assert abs(off[50]) > 2 * abs(off[500])

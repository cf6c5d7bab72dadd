from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DDPMScheduler

from octavo.diffusion.analytic import Gamma, analytic_trajectory, estimate_gamma
from octavo.diffusion.analytic.schedule import divergence_jumps
from octavo.diffusion.trajectories import noise_schedule
from octavo.errors import OctavoError

TWELVE = DDPMScheduler(num_train_timesteps=12, beta_start=0.01, beta_end=0.6)
ALPHA_BARS = noise_schedule(TWELVE).alpha_bars


def of_normal(variance: Any) -> Gamma:
    """Of normal data, or of data that look normal, with another variance, at each noise level."""
    values = (1 - ALPHA_BARS) / (ALPHA_BARS * variance + 1 - ALPHA_BARS)
    return Gamma(tuple(range(12)), tuple(values.tolist()), (0.0,) * 12, 12, "epsilon", 3, 45, 7, "model")


def test_of_twelve_timesteps_the_cheapest_of_all_are_found(
    ddpm: Callable[[Any], Any], tmp_path: Path
) -> None:
    """By brute force, by the paper's own form of the cost, on a network's own Gamma and on two made up."""
    own = estimate_gamma(ddpm(TWELVE), images=8, batch_size=8, workdir=tmp_path, progress=False)
    for gamma in (own, of_normal(np.linspace(0.02, 0.6, 12)), of_normal(np.linspace(0.9, 0.3, 12) ** 2)):

        def cost(timesteps: tuple[int, ...], gamma: Gamma = gamma) -> float:
            total = 0.0
            for s, t in pairwise(timesteps):
                noise = (1 - ALPHA_BARS[t]) / ALPHA_BARS[t]
                unknown = np.clip(noise * (1 - gamma.values[t]), 0, min(1.0, noise))
                bounded = 1 - unknown / noise  # Gamma within the bounds
                beta = 1 - ALPHA_BARS[t] / ALPHA_BARS[s]
                total += np.log(1 - beta * bounded / (1 - ALPHA_BARS[t]))
            return float(total)

        for steps in range(2, 13):
            found = analytic_trajectory(TWELVE, gamma, steps)
            every = [(0, *middle, 11) for middle in combinations(range(1, 11), steps - 2)]
            best = min(every, key=cost)
            assert found.timesteps == best[::-1]
            jumps = divergence_jumps(gamma, noise_schedule(TWELVE))
            assert found.facts["cost"] == pytest.approx(sum(jumps[s, t] for s, t in pairwise(best)))


def test_a_jumps_cost_is_the_divergence_of_the_two_laws() -> None:
    """Of normal data, by drawing x_0 and x_t: mean of KL(N(m, betatilde) || N(m*, sigma*^2)), written out."""
    variance, gamma = 0.25, of_normal(0.25)
    jumps = divergence_jumps(gamma, noise_schedule(TWELVE))
    draw = np.random.default_rng(0)
    for s, t in ((0, 3), (2, 9), (10, 11)):
        abar_s, abar_t = ALPHA_BARS[s], ALPHA_BARS[t]
        image = variance**0.5 * draw.normal(size=400_000)
        state = abar_t**0.5 * image + (1 - abar_t) ** 0.5 * draw.normal(size=400_000)
        alpha = abar_t / abar_s
        of_image = abar_s**0.5 * (1 - alpha) / (1 - abar_t)
        expected = abar_t**0.5 * variance / (abar_t * variance + 1 - abar_t) * state
        tilde = (1 - abar_s) / (1 - abar_t) * (1 - alpha)
        own_s, own_t = (abar * variance + 1 - abar for abar in (abar_s, abar_t))
        optimal = own_s - alpha * own_s**2 / own_t
        off = of_image * (image - expected)
        divergence = 0.5 * (np.log(optimal / tilde) + (tilde + off**2) / optimal - 1)
        assert jumps[s, t] == pytest.approx(divergence.mean(), rel=0.02)


def test_of_normal_data_all_trajectories_are_as_good() -> None:
    """Their reversal is exact in any steps: what is left is what q itself keeps of x_0."""
    jumps = divergence_jumps(of_normal(0.25), noise_schedule(TWELVE))
    costs = [
        sum(jumps[s, t] for s, t in pairwise((0, *middle, 11)))
        for count in range(11)
        for middle in combinations(range(1, 11), count)
    ]
    np.testing.assert_allclose(costs, costs[0], rtol=1e-9)


def test_it_is_a_trajectory_of_the_model() -> None:
    found = analytic_trajectory(TWELVE, of_normal(0.25), 4)
    assert (found.method, found.objective, found.model) == ("dp", "analytic", "model")
    assert (found.network_evaluations, found.seed, found.num_train_timesteps) == (45, 7, 12)
    assert found.timesteps[0] == 11 and found.timesteps[-1] == 0


def test_what_cannot_be_is_told() -> None:
    for steps in (1, 13, 2.0):
        with pytest.raises(OctavoError, match=rf"steps: {steps} is not a whole number from 2 to 12"):
            analytic_trajectory(TWELVE, of_normal(0.25), steps)  # type: ignore[arg-type]
    with pytest.raises(OctavoError, match="gamma: is for 12 training timesteps, the scheduler has 1000"):
        analytic_trajectory(DDPMScheduler(), of_normal(0.25), 4)

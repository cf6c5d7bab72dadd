"""Analytic-DPM's own timesteps: the cheapest path by the divergence that optimal variances leave, jump by jump."""

from __future__ import annotations

from typing import Any

import numpy as np

from octavo.diffusion.analytic.gamma import Gamma
from octavo.diffusion.analytic.variance import LARGEST, forward_variances, optimal_variances
from octavo.diffusion.trajectories.dynamic_programming import cheapest_paths
from octavo.diffusion.trajectories.schedule import Floats, NoiseSchedule, check_schedule, noise_schedule
from octavo.diffusion.trajectories.trajectory import Trajectory
from octavo.errors import OctavoError


def divergence_jumps(gamma: Gamma, schedule: NoiseSchedule, largest: float = LARGEST) -> Floats:
    """J[s, t], float64 [N, N]: what the jump from candidate t to candidate s < t costs, in nats for each number of x.

        J[s, t] = E KL(q(x_s | x_t, x_0) || p*(x_s | x_t)) / d = log(sigma*^2 / betatilde) / 2

    p* has the optimal mean and variance, q is DDPM's. Candidates are Gamma's timesteps, ascending; other entries are 0.
    Where no bound is met, it is log(1 - beta Gamma_t / (1 - abar_t)) / 2 plus a term of the path's two ends alone.
    Source: Bao et al. (2201.06503), equation 14.
    """
    alpha_bars = schedule.alpha_bars[list(gamma.timesteps)]
    count = len(alpha_bars)
    jumps = np.zeros((count, count))
    earlier, later = np.triu_indices(count, 1)
    s, t = alpha_bars[earlier], alpha_bars[later]
    optimal = optimal_variances(t, s, np.array(gamma.values)[later], "ddpm", largest)
    jumps[earlier, later] = np.log(optimal / forward_variances(t, s, "ddpm")) / 2
    return jumps


def analytic_trajectory(scheduler: Any, gamma: Gamma, steps: int, largest: float = LARGEST) -> Trajectory:
    """The `steps` of Gamma's timesteps whose jumps leave the least divergence: the optimum, at no evaluation more.

    The first and the last are fixed: the noisiest candidate, and the one nearest to the image. The cost is that of
    DDPM's optimal variances; for DDIM's, whose divergence is infinite, the same timesteps are a guess. What is best for
    the bound is not what is best for images (docs/trajectories.md). Of normal data all trajectories cost the same.

    Raises `OctavoError` for a Gamma of another schedule, and steps out of 2 .. the number of its timesteps.
    Source: Bao et al. (2201.06503), equations 15 and 16, after Watson et al. (2106.03802).
    """
    schedule = noise_schedule(scheduler)
    check_schedule(scheduler, gamma, "gamma", "estimate it on this model")
    count = len(gamma.timesteps)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 2 <= steps <= count:
        raise OctavoError(f"steps: {steps!r} is not a whole number from 2 to {count}, the timesteps of Gamma")
    # the candidate nearest to the image is where all paths end, so that K timesteps are K - 1 jumps
    paths = cheapest_paths(divergence_jumps(gamma, schedule, largest), steps - 1)
    nodes = (*paths.nodes[-1], 0)
    return Trajectory(
        tuple(gamma.timesteps[node] for node in nodes),
        schedule.num_train_timesteps,
        schedule.prediction_type,
        "dp",
        "analytic",
        gamma.network_evaluations,
        gamma.seed,
        gamma.model,
        {"cost": paths.costs[-1], "candidates": count},
        schedule.digest,
    )

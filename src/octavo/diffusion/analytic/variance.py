"""Optimal variances of the reverse process from Gamma, for whichever timesteps are visited: formulas and bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from octavo.diffusion.trajectories.schedule import Floats
from octavo.errors import OctavoError

KINDS = ("ddpm", "ddim")
"""The forward process that is reversed: the Markovian one of DDPM, or DDIM's with eta = 0."""
LARGEST = 1.0
"""Largest variance of x_0 given x_t: ((b - a) / 2)^2 of data in [a, b] = [-1, 1]. Latents are scaled to variance 1."""
LAST_NOISE = 1.0
"""Mean size of the last noise, in levels of 8 bits."""
LEVEL = 2 / 255
"""One of 256 levels of numbers in [-1, 1]."""


def check_kind(kind: str) -> None:
    """Raise `OctavoError` unless `kind` is one of KINDS."""
    if kind not in KINDS:
        raise OctavoError(f"kind: {kind!r} is not one of {', '.join(KINDS)}")


def forward_variances(alpha_bars_t: Floats, alpha_bars_s: Floats, kind: str) -> Floats:
    """lambda^2, the variance of q(x_s | x_t, x_0), t noisier than s, elementwise.

        ddpm  betatilde = (1 - abar_s) / (1 - abar_t) (1 - abar_t / abar_s)
        ddim  0

    Sources: DDPM (2006.11239), equation 7; DDIM (2010.02502), section 4.1, eta = 0.
    """
    check_kind(kind)
    if kind == "ddim":
        return np.zeros_like(alpha_bars_s)
    return (1 - alpha_bars_s) / (1 - alpha_bars_t) * (1 - alpha_bars_t / alpha_bars_s)


def image_variances(alpha_bars: Floats, gamma: Floats, largest: float = LARGEST) -> Floats:
    """The mean variance of x_0 given x_t, clip((1 - abar) / abar (1 - Gamma), 0, largest), elementwise.

    The clipping is Bao et al.'s (2201.06503) bounds of the optimal variance, equations 11 and 12, put where they all
    come from: this variance is not negative, and not more than that of data in so wide an interval.
    """
    gamma = np.clip(gamma, 0.0, 1.0)
    return np.minimum((1 - alpha_bars) / np.maximum(alpha_bars, 1e-12) * (1 - gamma), largest)


def optimal_variances(
    alpha_bars_t: Floats, alpha_bars_s: Floats, gamma: Floats, kind: str = "ddpm", largest: float = LARGEST
) -> Floats:
    """sigma*^2 of p(x_s | x_t) = N(mean, sigma*^2 I), elementwise, float64: nearest to q in KL divergence.

        sigma*^2 = lambda^2 + (sqrt(abar_s) - sqrt((1 - abar_s - lambda^2) abar_t / (1 - abar_t)))^2 v_t
        v_t      = clip((1 - abar_t) / abar_t (1 - Gamma_t), 0, largest)

    v_t is the variance of x_0 given x_t, which a mean of x_0 leaves out, and the square before it what a unit of x_0
    moves x_s by. `gamma`: Gamma at t. abar_s = 1 is the jump to the image, whose variance is v_t itself.

    Source: Bao et al. (2201.06503), equation 9 with 8 put in, where (1 - abar) Gamma is our Gamma; bounds 11 and 12.

    >>> abar_t, abar_s, variance = np.array([0.4]), np.array([0.9]), 0.25  # normal data, the exact network
    >>> gamma = (1 - abar_t) / (abar_t * variance + 1 - abar_t)
    >>> own = abar_s * variance + 1 - abar_s, abar_t * variance + 1 - abar_t
    >>> bool(np.allclose(optimal_variances(abar_t, abar_s, gamma), own[0] - abar_t / abar_s * own[0] ** 2 / own[1]))
    True
    """
    forward = forward_variances(alpha_bars_t, alpha_bars_s, kind)
    kept = np.maximum(1 - alpha_bars_s - forward, 0.0)
    moved = np.sqrt(alpha_bars_s) - np.sqrt(kept * alpha_bars_t / (1 - alpha_bars_t))
    return forward + moved**2 * image_variances(alpha_bars_t, gamma, largest)


def trajectory_variances(
    alpha_bars: Floats,
    timesteps: Sequence[int],
    gamma: Floats,
    kind: str = "ddpm",
    *,
    largest: float = LARGEST,
    last_noise: float | None = LAST_NOISE,
) -> Floats:
    """The variance of the noise that is added after each of K timesteps, float64 [K]; after the last there is none.

    alpha_bars  float64 [T]: of the schedule.
    timesteps   descending, any sub-sequence; after the last follows the image, of which the mean is taken.
    gamma       float64 [K]: Gamma at each of them.
    last_noise  y: the last noise that is added, into the last timestep, has sigma E|N(0, 1)| of at most y levels of
                8 bits, y 2 / 255, since one evaluation alone is left to take it out. None: it is not clipped.

    Source: Bao et al. (2201.06503), section 3 for sub-sequences, and their appendix on clipping for `last_noise`.

    >>> variances = trajectory_variances(np.array([0.9, 0.5, 0.1]), (2, 1, 0), np.ones(3))
    >>> variances.round(6).tolist()  # the middle one clipped from 0.088889
    [0.444444, 9.7e-05, 0.0]
    """
    if len(gamma) != len(timesteps):
        raise OctavoError(f"gamma: has {len(gamma)} values for {len(timesteps)} timesteps")
    visited = alpha_bars[list(timesteps)]
    variances = optimal_variances(visited, np.append(visited[1:], 1.0), gamma, kind, largest)
    variances[-1] = 0.0
    if last_noise is not None and len(timesteps) > 1:
        most = last_noise * LEVEL * math.sqrt(math.pi / 2)
        variances[-2] = min(variances[-2], most**2)
    return variances

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest

from octavo.diffusion.analytic.variance import optimal_variances, trajectory_variances
from octavo.errors import OctavoError

ALPHA_BARS = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
PAIRS = np.array(list(combinations([0, 20, 130, 400, 800, 999], 2)))
S, T = ALPHA_BARS[PAIRS[:, 0]], ALPHA_BARS[PAIRS[:, 1]]


def of_normal(alpha_bars: np.ndarray, variance: float) -> np.ndarray:
    return (1 - alpha_bars) / (alpha_bars * variance + 1 - alpha_bars)


def conditional_variance(covariance: np.ndarray) -> float:
    """Of the first given the second, of two normal numbers."""
    return float(covariance[0, 0] - covariance[0, 1] ** 2 / covariance[1, 1])


@pytest.mark.parametrize("variance", [1e-4, 0.25, 1.0])
@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_of_normal_data_it_is_the_true_posterior_variance(kind: str, variance: float) -> None:
    """From the joint law of (x_s, x_t), as a linear map of x_0 and independent noise."""
    found = optimal_variances(T, S, of_normal(T, variance), kind)
    for abar_s, abar_t, sigma in zip(S, T, found, strict=True):
        spread = np.diag([variance, 1.0, 1.0])
        to_s = np.array([abar_s**0.5, (1 - abar_s) ** 0.5, 0.0])
        if kind == "ddpm":  # x_t = sqrt(alpha) x_s + fresh noise
            alpha = abar_t / abar_s
            to_t = alpha**0.5 * to_s + np.array([0.0, 0.0, (1 - alpha) ** 0.5])
        else:  # both of the same noise
            to_t = np.array([abar_t**0.5, (1 - abar_t) ** 0.5, 0.0])
        joint = np.stack([to_s, to_t])
        expected = conditional_variance(joint @ spread @ joint.T)
        assert sigma == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_the_jump_to_the_image_has_the_variance_of_the_image() -> None:
    for kind in ("ddpm", "ddim"):
        found = optimal_variances(T, np.ones_like(T), of_normal(T, 0.25), kind)
        np.testing.assert_allclose(found, 0.25 * (1 - T) / (0.25 * T + 1 - T), rtol=1e-9)


def test_ddpms_is_beta_over_alpha_less_what_gamma_tells() -> None:
    """Bao et al.'s other form for lambda^2 = betatilde: beta / alpha (1 - beta Gamma / (1 - abar))."""
    gamma = of_normal(T, 0.25)
    beta = 1 - T / S
    expected = beta / (1 - beta) * (1 - beta * gamma / (1 - T))
    np.testing.assert_allclose(optimal_variances(T, S, gamma), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_it_is_within_the_papers_bounds_whatever_gamma_is(kind: str) -> None:
    forward = (1 - S) / (1 - T) * (1 - T / S) if kind == "ddpm" else np.zeros_like(S)
    of_score = (np.sqrt((1 - T) / (T / S)) - np.sqrt(np.maximum(1 - S - forward, 0))) ** 2
    of_data = (np.sqrt(S) - np.sqrt(np.maximum(1 - S - forward, 0) * T / (1 - T))) ** 2
    for gamma in (-0.2, 0.0, 0.5, 0.99, 1.0, 1.3):
        found = optimal_variances(T, S, np.full_like(T, gamma), kind)
        assert (found >= forward).all()
        assert (found <= forward + np.minimum(of_score, of_data) * (1 + 1e-9) + 1e-15).all()
        wide = optimal_variances(T, S, np.full_like(T, gamma), kind, largest=np.inf)
        inside = forward + of_score * (1 - np.clip(gamma, 0, 1))
        np.testing.assert_allclose(wide, inside, rtol=1e-6, atol=1e-12)


def test_without_a_bound_of_the_data_gamma_alone_decides() -> None:
    gamma = np.full_like(T, 0.9)
    wide, bounded = (optimal_variances(T, S, gamma, largest=largest) for largest in (np.inf, 1.0))
    assert (wide >= bounded).all() and (wide > 2 * bounded).any()


def test_zero_terminal_snr_is_bounded_by_the_data() -> None:
    found = optimal_variances(np.zeros(1), np.array([0.3]), np.ones(1), "ddim")
    assert found.tolist() == [0.0]  # Gamma says that all is known
    assert optimal_variances(np.zeros(1), np.array([0.3]), np.zeros(1), "ddim").tolist() == pytest.approx(
        [0.3]
    )


def test_along_a_trajectory_each_jump_has_its_own() -> None:
    timesteps = (950, 500, 100, 20)
    gamma = of_normal(ALPHA_BARS[list(timesteps)], 0.25)
    found = trajectory_variances(ALPHA_BARS, timesteps, gamma, last_noise=None)
    for i, (t, s) in enumerate(pairwise(timesteps)):
        one = optimal_variances(ALPHA_BARS[[t]], ALPHA_BARS[[s]], gamma[[i]])
        assert found[i] == one[0] > 0
    assert found[3] == 0 and len(found) == 4


def test_the_last_noise_is_clipped_to_levels_of_8_bits() -> None:
    timesteps = (950, 500, 100, 20)
    settings = {"gamma": np.full(4, 0.9)}
    free = trajectory_variances(ALPHA_BARS, timesteps, last_noise=None, **settings)
    noise = np.abs(np.random.default_rng(0).normal(size=200_000)).mean()
    for levels in (1.0, 2.0):
        found = trajectory_variances(ALPHA_BARS, timesteps, last_noise=levels, **settings)
        assert found[2] ** 0.5 * noise == pytest.approx(levels * 2 / 255, rel=0.01)
        assert found[2] < free[2] and np.array_equal(np.delete(found, 2), np.delete(free, 2))
    small = np.linspace(0.9999, 0.9998, 1000)
    assert np.array_equal(
        trajectory_variances(small, (9, 5), np.ones(2)),
        trajectory_variances(small, (9, 5), np.ones(2), last_noise=None),
    )
    assert trajectory_variances(ALPHA_BARS, (500,), np.ones(1)).tolist() == [0.0]


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(OctavoError, match="kind: 'sde' is not one of ddpm, ddim"):
        optimal_variances(T, S, np.ones_like(T), "sde")
    with pytest.raises(OctavoError, match="gamma: has 1 values for 2 timesteps"):
        trajectory_variances(ALPHA_BARS, (9, 5), np.ones(1))

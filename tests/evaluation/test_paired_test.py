"""Permutation tests against enumeration, finite differences, and repetition under the hypothesis."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from octavo.errors import OctavoError
from octavo.evaluation.frechet import FeatureStatistics, frechet_distance
from octavo.evaluation.kernel import kernel_distance
from octavo.evaluation.paired_test import distance_influence, same_distance_to, same_distribution


def normal(count: int, size: int, seed: int) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def test_statistic_is_the_kernel_distance() -> None:
    a, b = normal(30, 4, 0), normal(30, 4, 1) + 0.2
    for paired in (True, False):
        test = same_distribution(a, b, paired=paired, permutations=1)
        assert test.statistic == pytest.approx(kernel_distance(a, b, paired=paired).value, rel=1e-8)


def test_p_value_is_that_of_all_flips() -> None:
    a = normal(8, 3, 0)
    b = a + 0.3 * normal(8, 3, 1) + 0.25
    observed = kernel_distance(a, b, paired=True).value
    extreme = []
    for flips in product([False, True], repeat=8):
        swap = torch.tensor(flips)[:, None]
        swapped = kernel_distance(torch.where(swap, b, a), torch.where(swap, a, b), paired=True).value
        extreme.append(swapped >= observed - 1e-12)
    assert 0.02 < np.mean(extreme) < 0.9
    test = same_distribution(a, b, paired=True, permutations=4000)
    assert test.p_value == pytest.approx(np.mean(extreme), abs=0.03)


@pytest.mark.parametrize("paired", [True, False])
def test_levels_hold_under_the_hypothesis(paired: bool) -> None:
    real = FeatureStatistics.of(normal(500, 3, 5) + 0.2)
    alike, as_far = [], []
    for seed in range(200):
        common = normal(24, 3, seed) if paired else torch.zeros(24, 3)
        a = common + 0.5 * normal(24, 3, 1000 + seed)
        b = common + 0.5 * normal(24, 3, 2000 + seed)
        alike.append(same_distribution(a, b, paired=paired, permutations=99, seed=seed).p_value)
        as_far.append(same_distance_to(real, a, b, paired=paired, permutations=99, seed=seed).p_value)
    for p_values in (alike, as_far):
        assert 0.01 <= np.mean(np.array(p_values) <= 0.05) <= 0.1
        assert 0.42 < np.mean(p_values) < 0.58


def test_pairs_show_a_difference_that_labels_do_not() -> None:
    a = normal(100, 4, 0)
    b = a + 0.05
    assert same_distribution(a, b, paired=True, permutations=199).p_value == 1 / 200
    assert same_distribution(a, b, paired=False, permutations=199).p_value > 0.2


def test_equal_sets_and_seeds() -> None:
    a, b = normal(50, 4, 0), normal(50, 4, 1)
    assert same_distribution(a, a, paired=True).p_value == 1
    assert same_distance_to(b, a, a, paired=True).p_value == 1
    once, again = (same_distribution(a, b, paired=True, permutations=50, seed=3) for _ in range(2))
    assert once == again
    with pytest.raises(OctavoError, match="must be equal"):
        same_distribution(a, b[:40], paired=True)
    with pytest.raises(OctavoError, match="permutations"):
        same_distribution(a, b, paired=True, permutations=0)


def test_influence_is_the_slope_of_the_distance() -> None:
    features, real = normal(60, 4, 0).double(), FeatureStatistics.of(1.4 * normal(300, 4, 1) + 0.3)
    phi = distance_influence(features, real)
    assert abs(phi.mean()) < 1e-10

    def distance(weights: torch.Tensor) -> float:
        mean = weights @ features
        centred = features - mean
        covariance = (weights[:, None] * centred).T @ centred * (60 / 59)
        return frechet_distance(FeatureStatistics(mean, covariance, 60), real)

    even = torch.full((60,), 1 / 60, dtype=torch.float64)
    for row in (0, 17, 59):
        towards = torch.zeros(60, dtype=torch.float64)
        towards[row] = 1
        step = 1e-5
        slope = (distance(even + step * (towards - even)) - distance(even - step * (towards - even))) / (
            2 * step
        )
        # phi leaves the 60/59 out, as the test does: a constant factor of the quadratic part.
        assert phi[row].item() == pytest.approx(slope, rel=0.05, abs=0.05)


def test_linearised_difference_is_the_difference() -> None:
    real = FeatureStatistics.of(normal(500, 4, 5) + 0.5)
    a = normal(400, 4, 0)
    b = a + 0.02 * normal(400, 4, 1) - 0.02
    test = same_distance_to(real, a, b, paired=True, permutations=199)
    difference = frechet_distance(a, real) - frechet_distance(b, real)
    assert test.statistic == pytest.approx(difference, rel=0.02)
    assert test.p_value == 1 / 200


def test_linearised_p_value_agrees_with_the_distance_flipped() -> None:
    real = FeatureStatistics.of(normal(500, 3, 5) + 0.5)
    a = normal(60, 3, 0)
    b = a + 0.2 * normal(60, 3, 1) + 0.012
    observed = abs(frechet_distance(a, real) - frechet_distance(b, real))
    rng, extreme = np.random.default_rng(0), 0
    for _ in range(400):
        swap = torch.from_numpy(rng.integers(0, 2, (60, 1)).astype(bool))
        x, y = torch.where(swap, b, a), torch.where(swap, a, b)
        extreme += abs(frechet_distance(x, real) - frechet_distance(y, real)) >= observed
    p_value = same_distance_to(real, a, b, paired=True, permutations=2000).p_value
    assert 0.03 < extreme / 400 < 0.97
    assert p_value == pytest.approx(extreme / 400, abs=0.08)


def test_fewer_images_than_features() -> None:
    real = normal(100, 40, 5)
    a = normal(15, 40, 0)
    assert 0 < same_distance_to(real, a, a + 0.5, paired=True, permutations=99).p_value <= 0.05

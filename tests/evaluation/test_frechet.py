"""The Frechet distance against torchmetrics, closed forms, and its own repetition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from octavo.errors import OctavoError
from octavo.evaluation.frechet import (
    FeatureStatistics,
    fd_infinity,
    fd_infinity_estimate,
    frechet_difference,
    frechet_distance,
    frechet_estimate,
)


def normal(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Correlated features about 1, float32."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=torch.Generator().manual_seed(99)) / size**0.5
    return torch.randn(count, size, generator=generator) @ mixing + 1


class Identity(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.num_features = size

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


@pytest.mark.parametrize(("count", "size"), [(500, 8), (300, 64), (100, 20)])
def test_agrees_with_torchmetrics(count: int, size: int) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    a, b = normal(count, size, 1), 1.3 * normal(count, size, 2) + 0.1
    theirs = FrechetInceptionDistance(feature=Identity(size))
    theirs.set_dtype(torch.float64)
    theirs.update(a.double(), real=True)
    theirs.update(b.double(), real=False)
    assert frechet_distance(a, b) == pytest.approx(theirs.compute().item(), rel=1e-6)
    assert frechet_distance(FeatureStatistics.of(a), b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_fewer_images_than_features_agree_with_scipys_matrix_root() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    a, b = normal(30, 50, 1).double(), 1.2 * normal(40, 50, 2).double()
    one, other = (FeatureStatistics.of(x) for x in (a, b))
    root = linalg.sqrtm((one.covariance @ other.covariance).numpy())
    expected = (one.mean - other.mean).square().sum() + one.covariance.trace() + other.covariance.trace()
    # The root of a singular matrix is what the low-rank route is there to avoid: 1e-4 is the oracle's own error.
    assert frechet_distance(a, b) == pytest.approx(expected.item() - 2 * np.trace(root).real, rel=1e-4)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(one, other), rel=1e-6)


@pytest.mark.parametrize(("count", "size"), [(200, 16), (20, 64)])
def test_a_set_is_at_distance_0_from_itself_and_a_shift_is_squared(count: int, size: int) -> None:
    features = normal(count, size)
    trace = FeatureStatistics.of(features).covariance.trace().item()
    assert frechet_distance(features, features) < 1e-10 * trace
    assert frechet_distance(features, features + 0.5) == pytest.approx(0.25 * size, rel=1e-5)


def test_two_gaussians_in_one_dimension() -> None:
    one = FeatureStatistics(torch.tensor([1.0]).double(), torch.tensor([[4.0]]).double(), 10)
    other = FeatureStatistics(torch.tensor([3.0]).double(), torch.tensor([[9.0]]).double(), 10)
    assert frechet_distance(one, other) == pytest.approx((3 - 1) ** 2 + (3 - 2) ** 2)


def test_what_cannot_be_measured_is_one_line() -> None:
    with pytest.raises(OctavoError, match="N >= 2"):
        frechet_distance(torch.zeros(1, 4), torch.zeros(5, 4))
    with pytest.raises(OctavoError, match="use one extractor"):
        frechet_distance(torch.zeros(5, 4), torch.zeros(5, 3))
    with pytest.raises(OctavoError, match="not finite"):
        frechet_distance(torch.full((5, 4), torch.nan), torch.zeros(5, 4))
    with pytest.raises(OctavoError, match="not pairs"):
        frechet_estimate(torch.zeros(50, 2), torch.zeros(49, 2), paired=True)


def test_interval_to_real_covers_what_repetition_gives() -> None:
    real = FeatureStatistics.of(normal(50_000, 3, 7) + 0.3)
    estimates = [frechet_estimate(normal(200, 3, seed), real) for seed in range(120)]
    centre = np.mean([estimate.value for estimate in estimates])
    covered = np.mean([estimate.low < centre < estimate.high for estimate in estimates])
    assert 0.88 < covered <= 1.0
    # ... and is no wider than it must be.
    width = np.mean([(estimate.high - estimate.low) / 2 for estimate in estimates])
    assert 1.5 < width / np.std([estimate.value for estimate in estimates]) < 2.8


def test_interval_between_independent_sets_covers_what_repetition_gives() -> None:
    estimates = [
        frechet_estimate(normal(200, 3, seed), normal(200, 3, 1000 + seed) + 0.5) for seed in range(100)
    ]
    centre = np.mean([estimate.value for estimate in estimates])
    assert np.mean([estimate.low < centre < estimate.high for estimate in estimates]) > 0.86


def test_pairs_cancel_what_they_share() -> None:
    real = FeatureStatistics.of(normal(5000, 4, 3))
    a = normal(400, 4, 1)
    b = a + 0.01 * normal(400, 4, 2)
    paired = frechet_difference(a, b, real, paired=True)
    unpaired = frechet_difference(a, b, real, paired=False)
    assert paired.value == unpaired.value
    assert paired.value == pytest.approx(frechet_distance(a, real) - frechet_distance(b, real))
    assert paired.high - paired.low < 0.2 * (unpaired.high - unpaired.low)


def test_extrapolation_removes_the_bias_of_few_images() -> None:
    real = FeatureStatistics.of(normal(100_000, 16, 7))
    plain = np.mean([frechet_distance(normal(300, 16, seed), real) for seed in range(20)])
    extrapolated = np.mean([fd_infinity(normal(300, 16, seed), real, seed=seed) for seed in range(20)])
    assert plain > 0.05  # the same distribution: all of it is bias
    assert abs(extrapolated) < 0.2 * plain
    features = normal(300, 16)
    assert fd_infinity(features, real, seed=1) == fd_infinity(features, real, seed=1)
    with pytest.raises(OctavoError, match="too few"):
        fd_infinity(features[:39], real)


def test_the_interval_of_the_extrapolation_is_as_wide_as_repetition_says() -> None:
    real = FeatureStatistics.of(normal(100_000, 8, 7))
    estimates = [fd_infinity_estimate(normal(400, 8, seed), real, seed=seed) for seed in range(30)]
    spread = 1.96 * float(np.std([estimate.value for estimate in estimates], ddof=1))
    half = float(np.mean([(estimate.high - estimate.low) / 2 for estimate in estimates]))
    assert 0.5 * spread < half < 2.5 * spread
    covered = sum(estimate.low <= 0 <= estimate.high for estimate in estimates)  # the distance is 0
    assert covered >= 24

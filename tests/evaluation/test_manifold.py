from __future__ import annotations

import numpy as np
import pytest
import torch

from octavo.errors import OctavoError
from octavo.evaluation.intervals import group_of, jackknife_estimate
from octavo.evaluation.manifold import precision_recall


def brute_force(points: np.ndarray, manifold: np.ndarray, neighbours: int = 3) -> float:
    """The share of points within the manifold, by the definition and nothing else."""
    inside = 0
    for point in points:
        for k, centre in enumerate(manifold):
            others = np.delete(manifold, k, axis=0)
            radius = sorted(np.linalg.norm(others - centre, axis=1))[neighbours - 1]
            if np.linalg.norm(point - centre) <= radius:
                inside += 1
                break
    return inside / len(points)


@pytest.fixture
def sets() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(60, 3, generator=generator), 0.6 * torch.randn(45, 3, generator=generator) + 0.5


def test_agrees_with_brute_force(sets) -> None:
    a, b = sets
    shares = precision_recall(a, b)
    assert shares.precision.value == brute_force(a.numpy(), b.numpy()) < 1
    assert shares.recall.value == brute_force(b.numpy(), a.numpy())


@pytest.mark.parametrize("paired", [True, False])
def test_jackknife_leaves_groups_out_of_both(sets, paired: bool) -> None:
    a, b = sets[0][:45].numpy(), sets[1].numpy()
    groups = group_of(45)
    keeps = [groups != g for g in range(groups.max() + 1)]
    if paired:
        sides = [[brute_force(a[keep], b[keep]) for keep in keeps]]
    else:
        sides = [[brute_force(a[keep], b) for keep in keeps], [brute_force(a, b[keep]) for keep in keeps]]
    expected = jackknife_estimate(brute_force(a, b), *sides, low=0, high=1)
    estimate = precision_recall(torch.from_numpy(a), torch.from_numpy(b), paired=paired).precision
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high))


def test_ends_of_its_range() -> None:
    points = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    equal = precision_recall(points, points, paired=True)
    assert equal.precision.value == equal.recall.value == 1
    apart = precision_recall(points, points + 1000)
    assert apart.precision.value == apart.recall.value == 0
    # 40 of 40: a share of 0.9119 still gives that once in 40 draws, the lower end of the exact binomial interval.
    for estimate in (equal.precision, apart.recall):
        assert estimate.high - estimate.low == pytest.approx(1 - 0.9119, abs=1e-4)
    assert equal.precision.high == 1 and apart.recall.low == 0


def test_equal_points_count_as_within() -> None:
    point = 100 * torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    collapsed = point.expand(10, -1)
    assert precision_recall(collapsed, collapsed.clone()).precision.value == 1


def test_collapse_costs_recall_only() -> None:
    reference = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    shares = precision_recall(0.1 * reference, reference)
    assert shares.precision.value > 0.9 and shares.recall.value < 0.3


def test_too_few_images() -> None:
    with pytest.raises(OctavoError, match="too few"):
        precision_recall(torch.zeros(4, 2), torch.zeros(100, 2))
    with pytest.raises(OctavoError, match="not pairs"):
        precision_recall(torch.zeros(20, 2), torch.zeros(10, 2), paired=True)

from __future__ import annotations

import numpy as np
import pytest
import torch

from octavo.errors import OctavoError
from octavo.evaluation.intervals import group_of, jackknife_estimate
from octavo.evaluation.kernel import kernel_distance, polynomial_kernel


@pytest.fixture
def sets() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(103, 12, generator=generator)
    return a, a + 0.3 * torch.randn(103, 12, generator=generator) + 0.1


def test_agrees_with_torchmetrics(sets) -> None:
    from torchmetrics.image.kid import poly_mmd

    a, b = sets
    theirs = poly_mmd(a.double(), b.double()).item()
    assert kernel_distance(a, b).value == pytest.approx(theirs, rel=1e-9)
    # torchmetrics takes both sets of one size; ours also takes others.
    assert kernel_distance(a, b[:60]).value == pytest.approx(kernel_distance(b[:60], a).value, rel=1e-9)


def test_paired_leaves_out_the_pairs_own_terms(sets) -> None:
    a, b = sets
    aa, bb, ab = polynomial_kernel(a, a), polynomial_kernel(b, b), polynomial_kernel(a, b)
    apart = ~torch.eye(len(a), dtype=torch.bool)
    expected = aa[apart].mean() + bb[apart].mean() - 2 * ab[apart].mean()
    assert kernel_distance(a, b, paired=True).value == pytest.approx(expected.item(), rel=1e-9)
    same = kernel_distance(a, a, paired=True)
    assert abs(same.value) < 1e-12 and abs(same.high) < 1e-11
    assert kernel_distance(a, a).value < -1e-3  # what the usual estimator makes of pairs


@pytest.mark.parametrize("paired", [True, False])
def test_block_sums_give_the_distances_without_each_group(sets, paired: bool) -> None:
    a, b = sets
    groups = group_of(len(a))

    def plain(x: torch.Tensor, y: torch.Tensor) -> float:
        return kernel_distance(x, y, paired=paired).value

    without = [torch.from_numpy(groups != g) for g in range(groups.max() + 1)]
    if paired:
        sides = [[plain(a[keep], b[keep]) for keep in without]]
    else:
        sides = [[plain(a[keep], b) for keep in without], [plain(a, b[keep]) for keep in without]]
    expected = jackknife_estimate(plain(a, b), *sides)
    estimate = kernel_distance(a, b, paired=paired)
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), rel=1e-7)


def test_unbiased_on_independent_draws() -> None:
    values = []
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        values.append(
            kernel_distance(
                torch.randn(40, 5, generator=generator), torch.randn(40, 5, generator=generator)
            ).value
        )
    assert abs(np.mean(values)) < 3 * np.std(values) / 10


def test_unequal_pairs_are_refused(sets) -> None:
    with pytest.raises(OctavoError, match="not pairs"):
        kernel_distance(sets[0], sets[1][:50], paired=True)

from __future__ import annotations

import pytest
import torch

from octavo.quantization.grid import coarsen, count, exponent_of, points_of


@pytest.mark.parametrize("doublings", [0, 1, 2, 5])
def test_coarse_counts_are_sums_of_fine_ones(doublings: int, generator: torch.Generator) -> None:
    x = torch.randn(5000, generator=generator).clamp(-3.9, 3.9)
    fine = count(x, -8, 2048)
    assert torch.equal(coarsen(fine, doublings), count(x, -8 + doublings, 2048))


@pytest.mark.parametrize("end", [1.0, -1.0, 0.999, 1.001, -1.001, 1e-20, -3.4e38])
def test_exponent_is_the_smallest_that_fits(end: float) -> None:
    exponent = exponent_of(min(end, 0.0), max(end, 0.0), 64)
    assert -32 <= end // 2.0**exponent < 32
    assert not -32 <= end // 2.0 ** (exponent - 1) < 32


def test_points_keep_mass_and_mean(generator: torch.Generator) -> None:
    counts = torch.randint(0, 5, (16,), generator=generator)
    for points_per_bin in (1, 4):
        points, shared = points_of(counts, -3, points_per_bin)
        assert (points.diff() > 0).all()
        assert shared.sum() == counts.sum()
        centres = (torch.arange(16) - 7.5) / 8
        torch.testing.assert_close((points * shared).sum(), (centres * counts).sum().double())

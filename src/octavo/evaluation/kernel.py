"""The kernel distance between two sets of features (KID where they are Inception's)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.errors import OctavoError
from octavo.evaluation.intervals import Estimate, group_of, jackknife_estimate


def polynomial_kernel(a: Tensor, b: Tensor) -> Tensor:
    """k(x, y) = (x . y / D + 1)^3 of features [N, D] and [M, D] => float64 [N, M]. Binkowski et al. 2018, section 4.

    >>> polynomial_kernel(torch.ones(1, 4), torch.zeros(1, 4)).item()
    1.0
    """
    return (a.double() @ b.double().T / a.shape[1] + 1) ** 3


def kernel_distance(a: Tensor, b: Tensor, *, paired: bool = False) -> Estimate:
    """The unbiased squared maximum mean discrepancy of features a [N, D] and b [M, D], with its jackknife interval.

        MMD^2 = mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean_{i, j} k(a_i, b_j)

    The kernel is `polynomial_kernel`. `paired`: row i of both comes from one seed. Then the last mean leaves i = j out,
    because a_i and b_i are not independent; with them in, two equal sets would come out below 0. Unbiased, so it may
    be slightly negative. Takes memory for N / 20 rows of the kernel only. Source: Gretton et al. 2012, eq. 3 and 4;
    Binkowski et al. 2018 (1801.01401).

    Raises `OctavoError` for fewer than 4 images, or pairs of unequal number.
    """
    sums = _BlockSums(a, b, paired)
    sides = (
        [[sums.distance(g, g) for g in range(sums.groups)]]
        if paired
        else [
            [sums.distance(g, None) for g in range(sums.groups)],
            [sums.distance(None, g) for g in range(sums.groups)],
        ]
    )
    return jackknife_estimate(sums.distance(None, None), *sides)


class _BlockSums:
    """Sums of the kernel over pairs of groups: all that any leave-a-group-out distance needs."""

    def __init__(self, a: Tensor, b: Tensor, paired: bool) -> None:
        if paired and len(a) != len(b):
            raise OctavoError(f"features: {len(a)} and {len(b)} rows are not pairs")
        self.paired = paired
        self.groups = int(group_of(min(len(a), len(b))).max()) + 1
        groups_a, groups_b = np.arange(len(a)) % self.groups, np.arange(len(b)) % self.groups
        parts_a = [a[torch.from_numpy(groups_a == g)] for g in range(self.groups)]
        parts_b = [b[torch.from_numpy(groups_b == g)] for g in range(self.groups)]
        self.sizes_a = np.array([len(part) for part in parts_a])
        self.sizes_b = np.array([len(part) for part in parts_b])
        self.aa, self.bb = _sums(parts_a, a, groups_a), _sums(parts_b, b, groups_b)
        self.ab = _sums(parts_a, b, groups_b)
        self.own_a = np.array([_diagonal(part, part) for part in parts_a])
        self.own_b = np.array([_diagonal(part, part) for part in parts_b])
        self.own_ab = np.zeros(self.groups)
        if paired:
            self.own_ab = np.array([_diagonal(x, y) for x, y in zip(parts_a, parts_b, strict=True)])

    def distance(self, without_a: int | None, without_b: int | None) -> float:
        keep_a, keep_b = np.ones(self.groups, bool), np.ones(self.groups, bool)
        if without_a is not None:
            keep_a[without_a] = False
        if without_b is not None:
            keep_b[without_b] = False
        n, m = self.sizes_a[keep_a].sum(), self.sizes_b[keep_b].sum()
        within_a = (self.aa[np.ix_(keep_a, keep_a)].sum() - self.own_a[keep_a].sum()) / (n * (n - 1))
        within_b = (self.bb[np.ix_(keep_b, keep_b)].sum() - self.own_b[keep_b].sum()) / (m * (m - 1))
        pairs = n * (m - 1) if self.paired else n * m
        between = (self.ab[np.ix_(keep_a, keep_b)].sum() - self.own_ab[keep_a].sum()) / pairs
        return float(within_a + within_b - 2 * between)


def _sums(parts: list[Tensor], others: Tensor, groups: NDArray[np.int64]) -> NDArray[np.float64]:
    """The kernel's sum over each part and each group of the others, [G, G]."""
    columns = [polynomial_kernel(part, others).sum(0).numpy() for part in parts]
    return np.array([np.bincount(groups, weights=column, minlength=len(parts)) for column in columns])


def _diagonal(a: Tensor, b: Tensor) -> float:
    """The sum of k(a_i, b_i)."""
    return float((((a.double() * b.double()).sum(1) / a.shape[1] + 1) ** 3).sum())

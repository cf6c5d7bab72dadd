"""Does one set of images differ from another? Permutation tests, by sign flips where images are same-seed pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.errors import OctavoError
from octavo.evaluation.frechet import FeatureStatistics, gaussian
from octavo.evaluation.kernel import polynomial_kernel

LARGEST = 5_000  # rows of the kernel matrix that `same_distribution` holds: 200 MB


@dataclass(frozen=True)
class PermutationTest:
    """statistic: what was measured. p_value: (1 + permutations at least as extreme) / (1 + permutations).
    permutations: how many were drawn. images: how many of each side were used."""

    statistic: float
    p_value: float
    permutations: int
    images: int


def same_distribution(
    a: Tensor, b: Tensor, *, paired: bool, permutations: int = 1000, seed: int = 0
) -> PermutationTest:
    """Test the hypothesis that features a and b, both [N, D], are drawn alike; a small p says they differ.

    The statistic is `kernel_distance`'s MMD^2 (paired: without the terms k(a_i, b_i)). Same-seed pairs are
    exchangeable within a pair if quantizing changes nothing, so each permutation swaps the two of every pair with
    probability 1/2. With h_ij = k(a_i, a_j) + k(b_i, b_j) - k(a_i, b_j) - k(b_i, a_j) and signs s that is

        MMD^2(s) = sum_{i != j} s_i s_j h_ij / (N (N - 1))

    Unpaired: the 2 N labels are shuffled. Exact at any N. One-sided. Where the sets are too large, the first 5,000
    pairs (2,500 of either side if unpaired) are used. Source: Gretton et al. 2012; Ernst 2004 on permutation tests.
    Raises `OctavoError` for sets of unequal number or fewer than 2 images.

    >>> features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    >>> same_distribution(features, features, paired=True).p_value
    1.0
    """
    _check(a, b, permutations)
    count = min(len(a), LARGEST if paired else LARGEST // 2)
    a, b = a[:count], b[:count]
    generator = torch.Generator().manual_seed(seed)
    if paired:
        cross = polynomial_kernel(a, b)
        matrix = polynomial_kernel(a, a) + polynomial_kernel(b, b) - cross - cross.T
        signs = _flips(count, permutations, generator)
        observed = torch.ones(count, 1, dtype=torch.float64)
    else:
        both = torch.cat([a, b])
        matrix = polynomial_kernel(both, both)
        order = torch.stack([torch.randperm(2 * count, generator=generator) for _ in range(permutations)], 1)
        signs = (order < count).double() * 2 - 1
        observed = (torch.arange(2 * count) < count).double()[:, None] * 2 - 1
    matrix.fill_diagonal_(0)
    measured = float(_quadratic(matrix, observed))
    drawn = _quadratic(matrix, signs)
    return PermutationTest(
        statistic=_as_distance(measured, matrix, count, paired),
        p_value=_p_value(drawn, measured, float(matrix.abs().sum())),
        permutations=permutations,
        images=count,
    )


def same_distance_to(
    real: Tensor | FeatureStatistics,
    a: Tensor,
    b: Tensor,
    *,
    paired: bool,
    permutations: int = 1000,
    seed: int = 0,
) -> PermutationTest:
    """Test the hypothesis that a and b, both [N, D], are equally far from real data in Frechet distance.

    FD(., real) is linearised about both sets pooled, which no permutation changes: with mean m and covariance C of
    the pooled features, m_r and C_r of the real ones, and T = C^(-1/2) (C^(1/2) C_r C^(1/2))^(1/2) C^(-1/2),

        FD(a) - FD(b) = mean(phi(a)) - mean(phi(b)) + second order
        phi(x) = 2 (m - m_r) . (x - m) + (x - m)' (I - T) (x - m)

    Permutations as in `same_distribution`. Two-sided. The p-value is exact, whatever the second order is, where both
    are drawn alike; of sets that are equally far but not alike it holds for large N. Raises `OctavoError` as
    `same_distribution` does.
    """
    _check(a, b, permutations)
    scores = distance_influence(torch.cat([a, b]), real)
    count = len(a)
    generator = torch.Generator().manual_seed(seed)
    if paired:
        differences = scores[:count] - scores[count:]
        drawn = _flips(count, permutations, generator).T @ differences / count
    else:
        chosen = torch.stack([torch.randperm(2 * count, generator=generator) for _ in range(permutations)])
        drawn = 2 * scores[chosen[:, :count]].mean(1) - 2 * scores.mean()
    measured = float(scores[:count].mean() - scores[count:].mean())
    scale = float(scores.abs().sum())
    return PermutationTest(measured, _p_value(drawn.abs(), abs(measured), scale), permutations, count)


def distance_influence(features: Tensor, real: Tensor | FeatureStatistics) -> Tensor:
    """phi of `same_distance_to` for each row of features [N, D], about their own moments; float64 [N], mean 0.

    How fast FD(features, real) changes when a row gains weight.
    """
    target = gaussian(real)
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / (len(features) - 1))
    kept = values > 1e-10 * values.max()
    roots = values[kept].sqrt()
    whitened = vectors[:, kept].T @ target.factor  # in the pooled set's own axes
    inner_values, inner_vectors = torch.linalg.eigh(roots[:, None] * whitened @ whitened.T * roots)
    transport = (
        (vectors[:, kept] / roots) @ inner_vectors * inner_values.clamp(min=0) ** 0.25
    )  # T = its square
    scores = 2 * centred @ (mean - target.mean) + centred.square().sum(1)
    scores = scores - (centred @ transport).square().sum(1)
    return scores - scores.mean()


def _check(a: Tensor, b: Tensor, permutations: int) -> None:
    if a.shape != b.shape or len(a) < 2:
        raise OctavoError(f"features: {tuple(a.shape)} and {tuple(b.shape)} must be equal, of 2 rows or more")
    if permutations < 1:
        raise OctavoError(f"permutations: {permutations} is not at least 1")


def _flips(count: int, permutations: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (count, permutations), generator=generator).double() * 2 - 1


def _quadratic(matrix: Tensor, signs: Tensor) -> Tensor:
    """s' M s of each column s."""
    return (matrix @ signs * signs).sum(0)


def _as_distance(measured: float, matrix: Tensor, count: int, paired: bool) -> float:
    if paired:
        return measured / (count * (count - 1))
    total = float(matrix.sum())  # measured = within - 2 between, total = within + 2 between
    return (total + measured) / 2 / (count * (count - 1)) - (total - measured) / 2 / count**2


def _p_value(drawn: Tensor, measured: float, scale: float) -> float:
    """Ties, up to rounding of sums of that scale, count as at least as extreme."""
    extreme = int((drawn >= measured - 1e-13 * scale).sum())
    return (1 + extreme) / (1 + len(drawn))

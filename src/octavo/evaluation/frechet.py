"""The Frechet distance between Gaussians fitted to features (FID where they are Inception's)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.errors import OctavoError
from octavo.evaluation.intervals import Estimate, group_of, jackknife_estimate


@dataclass(frozen=True)
class FeatureStatistics:
    """First and second moments of D features over a set of images.

    mean: [D] float64. covariance: [D, D] float64, unbiased (divided by count - 1).
    count: the number of images they were taken over.
    """

    mean: Tensor
    covariance: Tensor
    count: int

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """The statistics of features [N, D], N >= 2, accumulated in float64.

        >>> statistics = FeatureStatistics.of(torch.tensor([[0.0], [2.0]]))
        >>> statistics.mean.item(), statistics.covariance.item(), statistics.count
        (1.0, 2.0, 2)
        """
        features = features.double()
        centred = features - features.mean(0)
        return cls(features.mean(0), centred.T @ centred / (len(features) - 1), len(features))


def frechet_distance(a: Tensor | FeatureStatistics, b: Tensor | FeatureStatistics) -> float:
    """The squared 2-Wasserstein distance of two Gaussians with the moments of `a` and `b`:

        FD = |mean_a - mean_b|^2 + tr(cov_a) + tr(cov_b) - 2 tr((cov_a cov_b)^(1/2))

    a, b: features [N, D] or `FeatureStatistics` of D features; float64 throughout. Never below 0. The trace of the
    root is the nuclear norm of F_a^T F_b, where F F^T is a covariance: its symmetric eigen-decomposition, or the
    centred features themselves where N < D. That keeps what is lost by rooting the eigenvalues of cov_a cov_b: the
    distance of a set to itself is 0 to 12 digits of its trace. With N images on each side the distance is too large
    by about 1 / N: compare equal N only, or see `fd_infinity`. Raises `OctavoError` for fewer than 2 images or
    another number of features. Source: Dowson and Landau 1982; Heusel et al. 2017 (1706.08500), eq. 6.

    >>> a = torch.tensor([[0.0, 0.0], [2.0, 2.0], [0.0, 2.0], [2.0, 0.0]])
    >>> round(frechet_distance(a, a + 3), 12)
    18.0
    """
    return gaussian(a).distance(gaussian(b))


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian by its mean [D] and a factor F [D, R] of its covariance F F^T (float64)."""

    mean: Tensor
    factor: Tensor

    def distance(self, other: Gaussian) -> float:
        """The squared 2-Wasserstein distance, see `frechet_distance`."""
        if len(self.mean) != len(other.mean):
            raise OctavoError(
                f"features: {len(self.mean)} on one side and {len(other.mean)} on the other; use one extractor"
            )
        spread = self.factor.square().sum() + other.factor.square().sum()
        overlap = torch.linalg.svdvals(self.factor.T @ other.factor).sum()
        distance = (self.mean - other.mean).square().sum() + spread - 2 * overlap
        return max(0.0, distance.item())


def gaussian(of: Tensor | FeatureStatistics) -> Gaussian:
    """The Gaussian with the moments of features [N, D] or of statistics, ready for several distances."""
    if isinstance(of, Tensor):
        if of.ndim != 2 or len(of) < 2:
            raise OctavoError(f"features: expected N >= 2 rows of D, got {' x '.join(map(str, of.shape))}")
        if not bool(torch.isfinite(of).all()):
            raise OctavoError("features: some are not finite; the images or the network are damaged")
        if len(of) < of.shape[1]:
            features = of.double()
            mean = features.mean(0)
            return Gaussian(mean, (features - mean).T / (len(features) - 1) ** 0.5)
        of = FeatureStatistics.of(of)
    values, vectors = torch.linalg.eigh(of.covariance)
    return Gaussian(of.mean, vectors * values.clamp(min=0).sqrt())


def frechet_estimate(a: Tensor, b: Tensor | FeatureStatistics, *, paired: bool = False) -> Estimate:
    """`frechet_distance` of a [N >= 4, D] to b with its jackknife interval.

    b as features: both sets are samples; `paired` says that row i of both comes from one seed. b as
    `FeatureStatistics`: the reference is taken as exact, as in every FID. 20 groups, 10 above 512 features, where a
    distance takes seconds.
    """
    without_a = list(_without_each(a))
    if isinstance(b, FeatureStatistics):
        target = gaussian(b)
        return jackknife_estimate(
            gaussian(a).distance(target), [one.distance(target) for one in without_a], low=0
        )
    whole_a, whole_b = gaussian(a), gaussian(b)
    without_b = list(_without_each(b))
    if paired:
        if len(a) != len(b):
            raise OctavoError(f"features: {len(a)} and {len(b)} rows are not pairs")
        sides = [[one.distance(other) for one, other in zip(without_a, without_b, strict=True)]]
    else:
        sides = [
            [one.distance(whole_b) for one in without_a],
            [whole_a.distance(other) for other in without_b],
        ]
    return jackknife_estimate(whole_a.distance(whole_b), *sides, low=0)


def frechet_difference(a: Tensor, b: Tensor, real: FeatureStatistics | Tensor, *, paired: bool) -> Estimate:
    """FD(a, real) - FD(b, real) of features a and b, both [N, D], with its jackknife interval.

    Equal N on both sides, so that the bias of about 1 / N nearly cancels. `paired`: row i of both comes from one seed;
    then what the two have in common cancels too, and the interval is much narrower than either distance's own.
    """
    target = gaussian(real)
    without_a = [one.distance(target) for one in _without_each(a)]
    without_b = [one.distance(target) for one in _without_each(b)]
    value = gaussian(a).distance(target) - gaussian(b).distance(target)
    if paired:
        return jackknife_estimate(value, [x - y for x, y in zip(without_a, without_b, strict=True)])
    return jackknife_estimate(value, without_a, without_b)


def _without_each(features: Tensor) -> Iterator[Gaussian]:
    """The Gaussian of the features without group 0, without group 1, ..."""
    groups = torch.from_numpy(group_of(len(features), 20 if features.shape[1] <= 512 else 10))
    for g in range(int(groups.max()) + 1):
        yield gaussian(features[groups != g])


SIZES = 8
"""Sizes of subsets by which FD is extrapolated; of all but the whole set two draws are taken."""


def fd_infinity(
    features: Tensor,
    reference: Tensor | FeatureStatistics,
    *,
    seed: int = 0,
    order: NDArray[np.float64] | None = None,
) -> float:
    """The Frechet distance extrapolated to infinitely many images on the side of `features`.

    FD of n images is FD_infinity + slope / n + O(1 / n^2): the distance is measured for SIZES sizes of subsets with
    1 / n evenly spaced between 1 / N and 4 / N, drawn without replacement in a seeded order, and a straight line's
    value at 1 / n = 0 is taken (least squares). Where `reference` is features too, both sides are drawn (the same rows
    of both). `order`: in place of `seed`, random numbers [2 SIZES, N]; draw k takes the images of the lowest in row k.
    May fall below 0 by noise. The line is straight only while N / 4 is well above D; below, part of the bias stays.
    Source: Chong and Forsyth 2020 (1911.07023), algorithm 1, with pseudo-random instead of Sobol points.

    Raises `OctavoError` for fewer than 40 images.
    """
    count = len(features)
    if count < 40:
        raise OctavoError(f"images: {count} are too few to extrapolate from; give at least 40")
    order = _order(count, seed) if order is None else order
    fixed = gaussian(reference)
    inverse, distances = [], []
    for k, size in enumerate((count / np.linspace(1, 4, SIZES)).astype(int)):
        draws = 1 if size == count else 2
        for draw in range(draws):
            rows = torch.from_numpy(np.argsort(order[2 * k + draw])[:size])
            other = fixed if isinstance(reference, FeatureStatistics) else gaussian(reference[rows])
            inverse.append(1 / size)
            distances.append(gaussian(features[rows]).distance(other))
    return float(np.polyfit(inverse, distances, 1)[1])


def fd_infinity_estimate(a: Tensor, b: Tensor | FeatureStatistics, *, seed: int = 0) -> Estimate:
    """`fd_infinity` of a [N >= 80, D] to b with its jackknife interval, 10 groups; b as features is cut alike.

    The images that stay are drawn in the order that they had: a subset differs by the group that left, and not by luck.
    """
    groups = torch.from_numpy(group_of(len(a), 10))
    order = _order(len(a), seed)
    without = []
    for g in range(int(groups.max()) + 1):
        stay = groups != g
        other = b if isinstance(b, FeatureStatistics) else b[stay]
        without.append(fd_infinity(a[stay], other, order=order[:, stay.numpy()]))
    return jackknife_estimate(fd_infinity(a, b, order=order), without)


def _order(count: int, seed: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).random((2 * SIZES, count))

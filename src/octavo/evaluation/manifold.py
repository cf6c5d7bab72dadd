"""Precision and recall: how much of either set of features lies within the other's manifold."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.errors import OctavoError
from octavo.evaluation.intervals import Estimate, group_of, jackknife_estimate

NEIGHBOURS = 3


@dataclass(frozen=True)
class PrecisionRecall:
    """precision: the share of images within the reference's manifold. recall: the share of references within the
    images' manifold."""

    precision: Estimate
    recall: Estimate


def precision_recall(
    images: Tensor, reference: Tensor, *, paired: bool = False, neighbours: int = NEIGHBOURS
) -> PrecisionRecall:
    """Improved precision and recall of features [N, D] against a reference [M, D], with jackknife intervals (at 0 and
    1, where a jackknife has no spread, Clopper and Pearson's).

    A set's manifold is the union of balls about its points, each reaching to the point's k-th nearest neighbour in
    the set: x lies within if |x - y| <= r_k(y) for some y. Takes memory for N x M float64. `paired`: row i of both
    comes from one seed, and a pair's two rows leave together in the jackknife; pairs that are almost equal lie within
    each other's balls trivially. Source: Kynkaanniemi et al. 2019 (1904.06991), eq. 1 and 2, k = 3.

    Raises `OctavoError` for fewer images than the neighbours need, or pairs of unequal number.

    >>> points = torch.arange(8.0)[:, None]
    >>> precision_recall(points + 0.5, points).precision.value
    1.0
    """
    if paired and len(images) != len(reference):
        raise OctavoError(f"features: {len(images)} and {len(reference)} rows are not pairs")
    fewest = min(len(images), len(reference))
    groups = int(group_of(fewest).max()) + 1
    if fewest - math.ceil(fewest / groups) <= neighbours:
        raise OctavoError(
            f"images: {fewest} are too few for {neighbours} neighbours; give at least {2 * neighbours + 2}"
        )
    between = _squared_distances(images, reference)
    ours, theirs = _Manifold(images, groups, neighbours), _Manifold(reference, groups, neighbours)
    return PrecisionRecall(
        precision=_share_within(between, ours.groups, theirs, paired),
        recall=_share_within(between.T, theirs.groups, ours, paired),
    )


def _share_within(between: Tensor, point_groups: Tensor, manifold: _Manifold, paired: bool) -> Estimate:
    """The share of points (rows of `between`) within the manifold (columns)."""
    within = manifold.holds(between, None)
    count = manifold.count
    # Without group g of the manifold: which points still lie within.
    still = torch.stack([manifold.holds(between, g) for g in range(count)])
    if paired:
        sides = [[_share(still[g][point_groups != g]) for g in range(count)]]
    else:
        sides = [
            [_share(within[point_groups != g]) for g in range(count)],
            [_share(still[g]) for g in range(count)],
        ]
    estimate = jackknife_estimate(_share(within), *sides, low=0, high=1)
    if estimate.low < estimate.high:
        return estimate
    # All within, or none, whatever leaves: no spread, but a few points outside, or within, may have been missed.
    margin = 1 - 0.025 ** (1 / len(within))
    low, high = max(0.0, estimate.value - margin), min(1.0, estimate.value + margin)
    return Estimate(estimate.value, low, high, f"Clopper-Pearson, {len(within)} images")


class _Manifold:
    """Points with, for each group of them, the nearest neighbours of every point in that group."""

    def __init__(self, points: Tensor, groups: int, neighbours: int) -> None:
        self.count, self.neighbours = groups, neighbours
        self.groups = torch.arange(len(points)) % groups
        # What rounding may add to a squared distance: equal points must count as equal.
        self.slack = 1e-12 * float(points.double().square().sum(1).max())
        distances = _squared_distances(points, points)
        distances.fill_diagonal_(math.inf)
        self.nearest = torch.stack(
            [
                _smallest(distances[:, self.groups == g], neighbours)  # [N, k]
                for g in range(groups)
            ],
            dim=1,
        )  # [N, G, k]

    def holds(self, between: Tensor, without: int | None) -> Tensor:
        """Which rows of `between` (squared distances to these points) lie within, once a group has left; bool."""
        nearest = self.nearest
        if without is not None:
            nearest = nearest.clone()
            nearest[:, without] = math.inf
        radii = nearest.flatten(1).kthvalue(self.neighbours, dim=1).values + self.slack
        if without is not None:
            radii[self.groups == without] = -1
        return (between <= radii).any(1)


def _smallest(distances: Tensor, count: int) -> Tensor:
    """The `count` smallest of each row, filled up with infinity."""
    found = distances.topk(min(count, distances.shape[1]), dim=1, largest=False).values
    missing = count - found.shape[1]
    return torch.nn.functional.pad(found, (0, missing), value=math.inf) if missing else found


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.double(), b.double()
    squares = a.square().sum(1)[:, None] + b.square().sum(1)
    return (squares - 2 * a @ b.T).clamp(min=0)


def _share(within: Tensor) -> float:
    return within.double().mean().item()

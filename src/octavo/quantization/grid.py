"""Bins about 0 whose width is a power of two: fine counts add up exactly to coarse ones.

Bin k of -B/2 .. B/2 - 1 holds the values with `floor(x / 2^e) = k`; bin k is stored at index k + B/2. A
product with a power of two and `floor` are exact, so where a value falls depends on nothing but the value and
e.
"""

from __future__ import annotations

import math

import torch

LOWEST_EXPONENT = -100


def exponent_of(low: float, high: float, bins: int) -> int:
    """The smallest e, from -100 up, with `-bins/2 <= floor(x / 2^e) < bins/2` for all x in [low, high].

    >>> exponent_of(-1.0, 0.99, bins=8), exponent_of(-1.0, 1.0, bins=8)
    (-2, -1)
    """
    exponent = LOWEST_EXPONENT
    for end in (low, high):
        mantissa, power = math.frexp(end)
        if mantissa == -0.5:
            power -= 1  # -2^k is the left edge of the lowest bin, 2^k is already outside
        if end != 0:
            exponent = max(exponent, power - bins.bit_length() + 2)
    return exponent


def count(x: torch.Tensor, exponent: int, bins: int) -> torch.Tensor:
    """How many of the values `x` (float `[N]`, all within the grid) fall in each bin: int64 `[bins]`.

    >>> count(torch.tensor([-0.25, 0.0, 0.1, 0.99]), exponent=-2, bins=8)
    tensor([0, 0, 0, 1, 2, 0, 0, 1])
    >>> count(torch.tensor([-1e-20, 1e30]), exponent=98, bins=8)
    tensor([0, 0, 0, 1, 0, 0, 0, 1])
    """
    index = x.float().mul(2.0**-exponent).floor_()
    if exponent > 0:  # else no product is so small that float32 makes -0 of it
        index = torch.where(x < 0, index.clamp(max=-1), index)
    return torch.bincount(index.add_(bins // 2).int(), minlength=bins)


def coarsen(counts: torch.Tensor, doublings: int) -> torch.Tensor:
    """The counts in bins twice as wide, `doublings` times over; as many bins, a wider grid.

    >>> coarsen(torch.tensor([1, 2, 3, 4]), 1)
    tensor([0, 3, 7, 0])
    """
    bins = counts.numel()
    for _ in range(min(doublings, bins.bit_length())):
        wider = torch.zeros_like(counts)
        wider[bins // 4 : bins - bins // 4] = counts.view(-1, 2).sum(1)
        counts = wider
    return counts


def points_of(
    counts: torch.Tensor, exponent: int, points_per_bin: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending float32 points that stand for the values, and their float64 counts; no empty bins.

    A bin's values are taken to be even within it: `points_per_bin` points share its count.

    >>> points_of(torch.tensor([0, 0, 0, 8]), exponent=0, points_per_bin=2)
    (tensor([1.2500, 1.7500]), tensor([4., 4.], dtype=torch.float64))
    """
    occupied = counts.nonzero()
    within = (torch.arange(points_per_bin, dtype=torch.float64) + 0.5) / points_per_bin
    points = (occupied - counts.numel() // 2 + within.to(counts.device)) * 2.0**exponent
    shared = counts[occupied].double() / points_per_bin
    return points.flatten().float(), shared.expand(-1, points_per_bin).flatten()

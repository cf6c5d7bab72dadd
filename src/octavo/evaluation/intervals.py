"""Figures with their 95 % intervals: means, and the delete-a-group jackknife for everything else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from octavo.errors import OctavoError


@dataclass(frozen=True)
class Estimate:
    """A figure, the ends of its 95 % interval, and how the interval was made. Ends are NaN where there is none.

    >>> print(Estimate(12.345, 11.9, 12.8, "by hand"))
    12.35 (11.90 to 12.80)
    """

    value: float
    low: float
    high: float
    method: str

    def as_json(self) -> dict[str, Any]:
        """The four fields; what JSON cannot hold (infinity, NaN) becomes null."""
        ends = {name: getattr(self, name) for name in ("value", "low", "high")}
        finite = {name: end if math.isfinite(end) else None for name, end in ends.items()}
        return {**finite, "method": self.method}

    def __str__(self) -> str:
        digits = _decimals(self.value)
        if math.isnan(self.low):
            return f"{self.value:.{digits}f}"
        return f"{self.value:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def mean_estimate(values: ArrayLike, of: str = "images") -> Estimate:
    """Mean of independent values [N] with its t-interval: mean +- t(N - 1) s / sqrt(N).

    `of`: what the values are taken over, for the method's name. One value has no interval (NaN ends); an infinite
    one makes the mean and both ends infinite. Raises `OctavoError` for no values.

    >>> print(mean_estimate([1.0, 2.0, 3.0], of="seeds"))
    2.000 (-0.484 to 4.484)
    """
    array: NDArray[np.float64] = np.asarray(values, dtype=np.float64).ravel()
    count = len(array)
    if count == 0:
        raise OctavoError("values: there are none to take a mean of")
    method = f"mean of {count} {of}, t-interval"
    mean = float(array.mean())
    if count == 1:
        return Estimate(mean, math.nan, math.nan, f"one of {of}, no interval")
    if not math.isfinite(mean):
        return Estimate(mean, mean, mean, method)
    half = t_quantile(count - 1) * float(array.std(ddof=1)) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, method)


def jackknife_estimate(
    value: float, *replicates: Sequence[float], low: float = -math.inf, high: float = math.inf
) -> Estimate:
    """A statistic with its delete-a-group jackknife interval: value +- t(G - 1) SE.

        SE^2 = sum over sides of (G - 1) / G * sum_g (value without group g - their mean)^2

    `value`: the statistic of all images. Each of `replicates`: the statistic without group 0, 1, ..., G - 1 of one
    independent side; images that are same-seed pairs are one side, and both images of a pair leave together.
    `low`, `high`: the statistic's own limits; the interval is cut there. The value is not corrected for bias. An
    interval of a distance that is almost 0 is only a guide, because such a distance is not nearly linear.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, eq. 11.5; Shao and Tu 1995, section 2.2.

    >>> numbers = np.arange(40.0)  # the jackknife of a mean is the mean's own standard error
    >>> estimate = jackknife_estimate(numbers.mean(), [np.delete(numbers, k).mean() for k in range(40)])
    >>> standard_error = numbers.std(ddof=1) / 40**0.5
    >>> print(f"{(estimate.high - estimate.value) / t_quantile(39) / standard_error:.6f}")
    1.000000
    """
    variance, groups = 0.0, 0
    for side in replicates:
        without = np.asarray(side, dtype=np.float64)
        groups = len(without)
        if groups < 2:
            raise OctavoError(f"replicates: a jackknife needs at least 2 groups, got {groups}")
        variance += float((groups - 1) / groups * ((without - without.mean()) ** 2).sum())
    method = f"delete-a-group jackknife, {groups} groups"
    half = t_quantile(groups - 1) * math.sqrt(variance)
    return Estimate(value, max(low, value - half), min(high, value + half), method)


def group_of(count: int, groups: int = 20) -> NDArray[np.int64]:
    """The group of each of `count` images, int64 [count]: image k is in group k mod G, G at most half of `count`.

    >>> group_of(7, groups=3).tolist()
    [0, 1, 2, 0, 1, 2, 0]
    """
    if count < 4:
        raise OctavoError(f"images: {count} are too few for an interval; give at least 4")
    return np.arange(count) % min(groups, count // 2)


def t_quantile(freedom: int, probability: float = 0.975) -> float:
    """The t with P(T <= t) = probability for Student's t with a whole number of degrees of freedom >= 1.

    By bisection of the distribution's closed form (Abramowitz and Stegun 1964, eq. 26.7.3 and 26.7.4).

    >>> [round(t_quantile(freedom), 3) for freedom in (1, 2, 3, 19, 1000)]
    [12.706, 4.303, 3.182, 2.093, 1.962]
    """
    if freedom > 10_000:
        return NormalDist().inv_cdf(probability)
    low, high = 0.0, math.pi / 2  # the angle theta = atan(t / sqrt(freedom))
    for _ in range(60):
        middle = (low + high) / 2
        if _central_probability(middle, freedom) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return math.tan(low) * math.sqrt(freedom)


def _central_probability(theta: float, freedom: int) -> float:
    """P(|T| <= tan(theta) sqrt(freedom))."""
    cosine = math.cos(theta)
    term = cosine if freedom % 2 else 1.0
    total = 0.0 if freedom == 1 else term
    for k in range(3 if freedom % 2 else 2, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    if freedom % 2:
        return 2 / math.pi * (theta + math.sin(theta) * total)
    return math.sin(theta) * total


def _decimals(value: float) -> int:
    """Decimals that leave about four significant digits."""
    if not math.isfinite(value) or value == 0:
        return 2
    return min(8, max(2, 3 - math.floor(math.log10(abs(value)))))

"""From the evaluation's own values to the report's plain ones."""

from __future__ import annotations

import contextlib
import math

import numpy as np

from octavo.errors import OctavoError
from octavo.evaluation.activation_ranges import ActivationRange
from octavo.evaluation.compare import Comparison
from octavo.evaluation.generate import Images
from octavo.evaluation.intervals import Estimate, mean_estimate
from octavo.evaluation.layer_error import LayerErrors
from octavo.evaluation.similarity import psnr, ssim
from octavo.report.data import ErrorMap, Figure, Interval, RangeOverTime


def interval(estimate: Estimate) -> Interval:
    """An `Estimate` with None where it has no ends."""
    return Interval(estimate.value, finite(estimate.low), finite(estimate.high), estimate.method)


def finite(value: float) -> float | None:
    """The value, or None where JSON has no number for it.

    >>> finite(1.5), finite(math.nan)
    (1.5, None)
    """
    return float(value) if math.isfinite(value) else None


def figures_of(comparison: Comparison) -> list[Figure]:
    """The quality table's rows: what was compared, and full precision's own figure where it has one."""
    rows: list[Figure] = []

    def add(
        name: str,
        estimate: Estimate | None,
        reference: Estimate | None = None,
        unit: str = "",
        better: str = "",
        note: str = "",
    ) -> None:
        if estimate is not None and math.isfinite(estimate.value):
            own = interval(reference) if reference is not None and math.isfinite(reference.value) else None
            rows.append(Figure(name, interval(estimate), own, unit, better, note))

    add("PSNR", comparison.psnr, None, "dB", "higher", "same-seed images, mean")
    add("SSIM", comparison.ssim, None, "", "higher", "same-seed images, mean")
    add("LPIPS", comparison.lpips, None, "", "lower", "same-seed images, mean")
    add("FD to full precision", comparison.fd, None, "", "lower", "between the two sets of images")
    add("sFD to full precision", comparison.sfd, None, "", "lower", "of spatial features")
    add("KID to full precision", comparison.kid, None, "", "lower", "unbiased, may fall below 0")
    add("Precision", comparison.precision, None, "", "higher", "of full precision's images")
    add("Recall", comparison.recall, None, "", "higher", "of full precision's images")
    add("FD to real data", comparison.fd_real, comparison.fd_real_reference, "", "lower")
    add("KID to real data", comparison.kid_real, comparison.kid_real_reference, "", "lower")
    add("FD at infinitely many images", comparison.fd_infinity, comparison.fd_infinity_reference, "", "lower")
    add("Inception score", comparison.inception_score, comparison.inception_score_reference, "", "higher")
    return rows


def same_seed_figures(images: Images, reference: Images) -> list[Figure]:
    """The quality table where no features are chosen: what can be told of the pairs alone."""
    note = "same-seed images, mean"
    rows = [
        Figure(
            "PSNR",
            interval(mean_estimate(np.minimum(psnr(images, reference), 100.0))),
            None,
            "dB",
            "higher",
            note,
        )
    ]
    with contextlib.suppress(OctavoError):  # images too small for its window
        similar = interval(mean_estimate(ssim(images, reference)))
        rows.append(Figure("SSIM", similar, None, "", "higher", note))
    return rows


def error_map(found: LayerErrors) -> ErrorMap:
    """Errors with four significant digits."""
    return ErrorMap(
        layers=list(found.layers),
        timesteps=list(found.timesteps),
        errors=[[None if math.isnan(e) else significant(e, 4) for e in row] for row in found.errors.tolist()],
        worst=found.worst(),
    )


def range_over_time(found: ActivationRange) -> RangeOverTime:
    """One layer's ranges as lists, with five significant digits."""

    def short(values: list[float]) -> list[float]:
        return [significant(value, 5) for value in values]

    return RangeOverTime(
        layer=found.layer,
        timesteps=list(found.timesteps),
        minimum=short(found.minimum.tolist()),
        maximum=short(found.maximum.tolist()),
        quantiles=[short(row) for row in found.quantiles.tolist()],
        outside=short(found.outside.tolist()),
        scale=found.chosen.scale,
        zero_point=found.chosen.zero_point,
        bits=found.chosen.bits,
        low=found.chosen.low,
        high=found.chosen.high,
    )


def significant(value: float, digits: int) -> float:
    """Rounded to so many significant digits.

    >>> significant(0.0123456, 3)
    0.0123
    """
    return float(f"{value:.{digits}g}")

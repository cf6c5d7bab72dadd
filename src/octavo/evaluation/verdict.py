"""The verdict in one line: smaller by, faster by, how close, and whether a difference can be shown at all."""

from __future__ import annotations

from octavo.evaluation.comparison import Comparison
from octavo.evaluation.cost import Cost

LEVEL = 0.05
"""A difference is called shown where chance alone would make one as large in fewer than 5 of 100 draws."""

PAIRS_ALONE = "no features were asked for, so nothing is said of the images as a set"


def verdict(comparison: Comparison, cost: Cost | None = None, reference_cost: Cost | None = None) -> str:
    """One line for someone who decides whether to use the model in the reference's place.

    Costs where they are at hand: size, bit operations, speed with its quartiles. Then the same-seed PSNR with its 95 %
    interval (of pairs), the Frechet distance between the two sets, and what the tests say: that they differ where a
    p-value is below LEVEL, else that no difference was found, which is no proof of equality.
    """
    parts = []
    if cost and reference_cost:
        parts.append(f"{reference_cost.bytes / cost.bytes:.2f}x smaller")
        parts.append(f"{reference_cost.bops / cost.bops:.1f}x fewer bit operations")
        if cost.latency:
            ratio, low, high = (float(cost.latency[key]) for key in ("ratio", "ratio_low", "ratio_high"))
            word = "faster" if ratio >= 1 else "slower"
            if ratio < 1:
                ratio, low, high = 1 / ratio, 1 / high, 1 / low
            parts.append(f"{ratio:.2f}x {word} (quartiles {low:.2f} to {high:.2f})")
    if comparison.psnr is not None:
        parts.append(f"PSNR {comparison.psnr} dB")
    if comparison.fd is None:
        return f"{', '.join(parts)}; {PAIRS_ALONE}"
    parts.append(f"FD {comparison.fd} between the sets")
    return f"{', '.join(parts)}; {_difference(comparison)}"


def _difference(comparison: Comparison) -> str:
    said = comparison.verdict(LEVEL)
    if comparison.p_same_real is None:
        return said
    differ = "differ" if comparison.p_same_real < LEVEL else "show no difference"
    return f"{said}; their distances to real images {differ} (p = {comparison.p_same_real:.3g})"

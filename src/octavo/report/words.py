"""Numbers in words: the verdict, what speaks for and against, and figures as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from octavo.report.data import Interval, ReportData, Row

LIKELY_DIFFERENT = 0.05
VISIBLE = 30.0
"""dB. Below it, pixels differ by more than 3.2 % of the range (root mean square): people see it side by side."""
UNFIT = 20.0
"""dB. Below it, pixels differ by more than 10 % of the range: these are other images."""


def headline(data: ReportData) -> str:
    """The verdict in one line. A mean PSNR below `VISIBLE` or `UNFIT` is called what it is.

    >>> from octavo.report.data import Verdict
    >>> verdict = Verdict(25, 100, Interval(50.6, 49.6, 51.6), 64, Interval(3.51, 3.1, 3.7))
    >>> print(ascii(headline(ReportData("digits-int8", {}, verdict))))
    '4.0\\xd7 smaller, 3.5\\xd7 faster, and 50.6 \\xb1 1.0 dB from full precision.'
    """
    verdict = data.verdict
    if verdict is None:
        if data.study:
            return f"What holds of PTQ4DM on {data.title}"
        return f"What was chosen for {data.title}" if data.tuning else data.title
    parts = [f"{verdict.float_bytes / verdict.size_bytes:.1f}\N{MULTIPLICATION SIGN} smaller"]
    if verdict.speed is not None:
        parts.append(_speed(verdict.speed.value))
    distance = f"{verdict.psnr.value:.1f}"
    if verdict.psnr.low is not None and verdict.psnr.high is not None:
        distance += f" \N{PLUS-MINUS SIGN} {(verdict.psnr.high - verdict.psnr.low) / 2:.1f}"
    told = _difference(verdict.psnr.value)
    end = f": {told}." if told else "."
    return f"{', '.join(parts)}, {'but' if told else 'and'} {distance} dB from full precision{end}"


def _difference(decibels: float) -> str:
    """What is to be said of images so far from their full-precision twins; nothing where they look alike.

    >>> [_difference(decibels) for decibels in (30.0, 29.9, 19.9)]
    ['', 'visibly different', 'visibly different, not fit to ship']
    """
    if decibels >= VISIBLE:
        return ""
    return "visibly different" if decibels >= UNFIT else "visibly different, not fit to ship"


def _speed(ratio: float) -> str:
    if abs(ratio - 1) < 0.03:
        return "as fast"
    times = f"{max(ratio, 1 / ratio):.1f}\N{MULTIPLICATION SIGN}"
    return f"{times} faster" if ratio > 1 else f"{times} slower"


def checks(data: ReportData) -> list[Row]:
    """What someone who decides wants to know first: a sign (not by colour) and a sentence each."""
    found: list[Row] = []

    def add(good: bool | None, text: str) -> None:
        found.append({"sign": {True: "\u2713", False: "\u2717", None: "\u2013"}[good], "text": text})

    if data.audit:
        integers = sum(bool(row["ok"]) for row in data.audit)
        simulated = data.made.get("engine") == "simulation in torch"
        add(None if simulated else integers == len(data.audit), audit_line(data))
    verdict = data.verdict
    if verdict is not None and verdict.speed is not None and (verdict.speed.low or 0) < 1:
        told = "It is slower" if verdict.speed.value < 1 else "Whether it is faster is not certain"
        times = f"{span(verdict.speed, 2)}\N{MULTIPLICATION SIGN}"
        add(False, f"{told} on this machine: {times} the speed of {verdict.baseline} (quartiles).")
    if verdict is not None and (told := _difference(verdict.psnr.value)):
        limit = VISIBLE if verdict.psnr.value >= UNFIT else UNFIT
        add(
            False,
            f"The images are {told}: {verdict.psnr.value:.1f} dB on average is below {limit:.0f} dB, "
            f"where pixels differ by {figure(rms(limit))} % of the range.",
        )
    if data.gallery and data.gallery.pairs:
        worst = data.gallery.pairs[0]
        add(
            None if worst.psnr >= UNFIT else False,
            f"The worst of {data.gallery.num_images} images is {worst.psnr:.1f} dB from its full-precision twin "
            f"(seed {worst.seed}): pixels differ by {figure(rms(worst.psnr))} % of the range.",
        )
    if verdict is not None and verdict.p_value is not None:
        differs = verdict.p_value < LIKELY_DIFFERENT
        add(
            False if differs else None,  # that nothing was seen in so few images is not yet good news
            f"A paired test {'tells' if differs else 'does not tell'} the two sets of images apart "
            f"(p = {verdict.p_value:.3f}, {verdict.num_images} pairs{'' if differs else '; more might'}).",
        )
    return found


def audit_line(data: ReportData) -> str:
    """How many of the layers that are to run on integers do, and how many are not to."""
    count, integers = len(data.audit), sum(bool(row["ok"]) for row in data.audit)
    more = f"; {len(data.weights_alone)} more have integer weights alone" if data.weights_alone else ""
    if data.made.get("engine") == "simulation in torch":
        return (
            f"{count} layers with integer activations in torch's simulation{more}: nothing ran on integers, so no "
            "speed is shown."
        )
    rest = data.made.get("float remainder")
    what = f"{'All ' if integers == count else ''}{integers} of {count} layers with integer activations run in int8"
    twice = sum(row.get("kernels", 1) > 1 for row in data.audit)
    why = (
        "take two kernels, because this CPU has no VNNI: with --pair-limit, or 7-bit weights, they take one."
    )
    slow = f" {twice} {why}" if twice else ""
    return f"{what}{more}{f'; what stays float is computed in {rest}' if rest else ''}.{slow}"


def distribution(described: Mapping[str, Any]) -> str:
    """A timestep distribution as one would call it.

    >>> distribution({"name": "ndtc", "mean": 0.4, "std": 0.5})
    'ndtc(mean=0.4, std=0.5)'
    """
    rest = ", ".join(f"{key}={value}" for key, value in described.items() if key != "name")
    return f"{described.get('name', '')}({rest})" if rest else str(described.get("name", ""))


def span(value: Interval | Mapping[str, Any], decimals: int | None = None) -> str:
    """The interval's two ends, or nothing where there is none.

    >>> span(Interval(3.0, 2.5, 3.25), 1)
    '2.5 to 3.2'
    """
    low, high = (value[end] if isinstance(value, Mapping) else getattr(value, end) for end in ("low", "high"))
    if low is None or high is None:
        return ""
    return f"{figure(low, decimals)} to {figure(high, decimals)}"


def figure(value: float, decimals: int | None = None) -> str:
    """A figure with as many decimals as a reader can use, and a true minus sign.

    >>> [figure(value) for value in (1234.5, 50.64, 0.9876, 0.00123, -0.5, 0.0)]
    ['1234', '50.6', '0.988', '0.0012', '\u22120.500', '0']
    """
    if decimals is None:
        size = abs(value)
        decimals = 0 if size >= 1000 or size == 0 else 1 if size >= 10 else 2 if size >= 1 else 3
        if 0 < size < 0.1:
            decimals = min(1 - math.floor(math.log10(size)), 8)
    return f"{value:.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def significant(value: float, digits: int) -> str:
    """So many significant digits, never in powers of ten where it can be helped.

    >>> significant(0.012345, 2), significant(999.0, 4), significant(0.0, 2)
    ('0.012', '999', '0')
    """
    return f"{value:.{digits}g}".replace("-", "\N{MINUS SIGN}")


def rms(decibels: float) -> float:
    """Root mean square difference in percent of the range: 100 * 10^(-PSNR / 20).

    >>> rms(40.0)
    1.0
    """
    return float(100 * 10 ** (-decibels / 20))


def breakable(name: str) -> Any:
    """A dotted layer name, escaped, that may be broken after its dots."""
    from markupsafe import Markup, escape

    return Markup(".<wbr>").join(escape(part) for part in name.split("."))


FILTERS: dict[str, Any] = {
    "fixed": figure,
    "figure": figure,
    "sig": significant,
    "span": span,
    "rms": rms,
    "breakable": breakable,
    "megabytes": lambda count: f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB",
}
"""The template's filters."""

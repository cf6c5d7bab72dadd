"""Honest timing: the engines take turns in one process, and ratios come with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

REST = 0.1


@dataclass(frozen=True)
class Timing:
    """Seconds of one engine, one figure a round, in the order of the rounds."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.seconds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def ratio(self, other: Timing) -> tuple[float, float, float]:
        """How many times faster than `other`: median, lower and upper quartile of the round-by-round ratios."""
        ratios = Timing([b / a for a, b in zip(self.seconds, other.seconds, strict=True)])
        return (ratios.median, *ratios.quartiles)


def take_turns(
    engines: Mapping[str, Callable[[], Any]], *, rounds: int = 15, warm_up: int = 2, rest: float = REST
) -> dict[str, Timing]:
    """Time each engine once a round: A B C, A B C, ... so that a drift of the machine meets all of them alike.

    Each turn begins `rest` seconds after the last: threads of some engines (ONNX Runtime, OpenMP) go on spinning for
    more work, on the processors that the next one needs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for round_number in range(warm_up + rounds):
        for name, run in engines.items():
            time.sleep(rest)
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            if round_number >= warm_up:
                seconds[name].append(elapsed)
    return {name: Timing(values) for name, values in seconds.items()}


def table(timings: Mapping[str, Timing], baseline: str, per: int = 1) -> list[dict[str, float | str]]:
    """One row an engine: milliseconds (median and quartiles), items per second, speed over `baseline` with quartiles.

    `per`: items (images, evaluations) that one round makes.
    """
    rows: list[dict[str, float | str]] = []
    for name, timing in timings.items():
        low, high = timing.quartiles
        ratio, ratio_low, ratio_high = timing.ratio(timings[baseline])
        rows.append(
            {
                "engine": name,
                "ms": round(1e3 * timing.median, 3),
                "ms_low": round(1e3 * low, 3),
                "ms_high": round(1e3 * high, 3),
                "per_second": round(per / timing.median, 3),
                "ratio": round(ratio, 3),
                "ratio_low": round(ratio_low, 3),
                "ratio_high": round(ratio_high, 3),
            }
        )
    return rows


def format_table(rows: Sequence[Mapping[str, Any]], unit: str, baseline: str) -> str:
    """The rows as aligned text for a terminal, with a column for `psnr` (in dB, None: equal) where the rows have it."""
    width = max(len(str(row["engine"])) for row in rows)
    has_psnr = any("psnr" in row for row in rows)
    lines = [
        f"{'engine':<{width}}  {'ms':>9}  {'quartiles':>19}  {unit + '/s':>12}  "
        f"{'PSNR, dB  ' if has_psnr else ''}over {baseline} (quartiles)"
    ]
    for row in rows:
        quartiles = f"{row['ms_low']:.2f}-{row['ms_high']:.2f}"
        spread = f"{row['ratio']:.2f}x ({row['ratio_low']:.2f}-{row['ratio_high']:.2f})"
        decibels = (
            f"{'-' if row.get('psnr') is None else format(row['psnr'], '.2f'):>8}  " if has_psnr else ""
        )
        lines.append(
            f"{row['engine']:<{width}}  {row['ms']:>9.2f}  {quartiles:>19}  {row['per_second']:>12.2f}  "
            f"{decibels}{spread}"
        )
    return "\n".join(lines)

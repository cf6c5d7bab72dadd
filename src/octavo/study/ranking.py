"""From effects to ranks: end effect against single-evaluation error, why they differ, whether effects add up"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.evaluation.intervals import mean_estimate

TOP = 8
"""The layers by which "so many carry so much of it" is told."""


def ranking(measured: Mapping[str, Any]) -> dict[str, Any]:
    """What `sensitivity.json` concludes from its measurements (JSON), for each width by itself.

    rows      one for each layer, that with the largest end effect at the first width first: its `end` effect (mean
              squared error of the final images, with the t-interval over images), `single` (mean squared error of one
              evaluation, mean over the steps), `by_steps`, ranks by each (1 is the largest), and `centre`: the timestep
              at which it errs, the mean of timesteps weighted by their squared errors.
    agree     Spearman's rank correlations of `single` and of `by_steps` with `end`.
    top       the share of all end effects, and of all single-evaluation errors, of the `TOP` layers by single error.
    additive  the sum of the end effects of single layers, the end effect of all at once, and its ratio to the sum; the
              same of single-evaluation errors.
    gains     for each step: the end effect of all layers quantized at this step only, over their single-evaluation
              error there. How much of an error made at this step arrives in the image.

    `by_steps` is what the end effect would be if errors of different steps were independent:

        sum over steps t of gain[t] x single[t]

    `over_by_steps` is the median over layers of `end` / `by_steps`. Above 1 a layer's errors add up from step to step,
    or arrive in the image more than those of all layers together, of which the gains are; the two are not told apart.
    """
    widths = list(measured["all"])
    timesteps = np.asarray(measured["timesteps"], dtype=np.float64)
    gains = _gains(measured, widths[0])
    columns = {bits: _columns(measured, bits, gains, timesteps) for bits in widths}
    order = np.argsort(-columns[widths[0]]["end"], kind="stable")
    rows = []
    for i in order:
        row = measured["layers"][i]
        rows.append(
            {
                "layer": row["layer"],
                "float_bytes": row["float_bytes"],
                "options": {
                    bits: {
                        "bytes": row["options"][bits]["bytes"],
                        "end": mean_estimate(row["options"][bits]["squared_errors"]).as_json(),
                        "single": float(columns[bits]["single"][i]),
                        "by_steps": float(columns[bits]["by_steps"][i]),
                        "centre": _finite(columns[bits]["centre"][i]),
                        **{
                            f"rank_{by}": int(_ranks(-columns[bits][by])[i]) + 1
                            for by in ("end", "single", "by_steps")
                        },
                    }
                    for bits in widths
                },
            }
        )
    return {
        "rows": rows,
        "floor": mean_estimate(measured["floor"]).as_json(),
        "agree": {
            bits: {
                by: _finite(spearman(columns[bits][by], columns[bits]["end"]))
                for by in ("single", "by_steps")
            }
            for bits in widths
        },
        "over_by_steps": {bits: _over_by_steps(columns[bits]) for bits in widths},
        "top": {bits: _top(columns[bits]) for bits in widths},
        "additive": {bits: _additive(measured, bits) for bits in widths},
        "gains": [
            {"timestep": float(t), "gain": _finite(gain), "single": float(single), "end": float(end)}
            for t, gain, single, end in zip(
                timesteps,
                gains,
                measured["all"][widths[0]]["single_errors"],
                _step_effects(measured),
                strict=True,
            )
        ],
    }


def spearman(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Spearman's rank correlation of two arrays [N]; NaN where one of them is constant.

    >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 8.0, 9.0]))
    1.0
    """
    if min(np.ptp(first), np.ptp(second)) == 0:
        return math.nan
    ranks = [np.array([((a < x).sum() + (a <= x).sum() - 1) / 2 for x in a]) for a in (first, second)]
    return round(float(np.corrcoef(ranks[0], ranks[1])[0, 1]), 12)


def _step_effects(measured: Mapping[str, Any]) -> NDArray[np.float64]:
    return np.array([np.mean(measured["steps"][f"{t:g}"]) for t in measured["timesteps"]])


def _gains(measured: Mapping[str, Any], bits: str) -> NDArray[np.float64]:
    single = np.asarray(measured["all"][bits]["single_errors"], dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        gains: NDArray[np.float64] = _step_effects(measured) / single
    return np.where(np.isfinite(gains), gains, 0.0)


def _columns(
    measured: Mapping[str, Any], bits: str, gains: NDArray[np.float64], timesteps: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    options = [row["options"][bits] for row in measured["layers"]]
    by_step = np.array([option["single_errors"] for option in options], dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        centre = by_step @ timesteps / by_step.sum(axis=1)
    return {
        "end": np.array([np.mean(option["squared_errors"]) for option in options]),
        "single": by_step.mean(axis=1),
        "by_steps": by_step @ gains,
        "centre": centre,
    }


def _ranks(values: NDArray[np.float64]) -> NDArray[np.int64]:
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    return ranks


def _top(columns: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
    largest = np.argsort(-columns["single"], kind="stable")[:TOP]
    ours = np.argsort(-columns["end"], kind="stable")[:TOP]
    return {
        "layers": len(largest),
        "of_single": _share(columns["single"], largest),
        "of_end": _share(columns["end"], largest),
        "of_end_at_best": _share(columns["end"], ours),
        "in_common": len(set(largest.tolist()) & set(ours.tolist())),
    }


def _over_by_steps(columns: Mapping[str, NDArray[np.float64]]) -> float | None:
    seen = columns["by_steps"] > 0
    return _finite(float(np.median(columns["end"][seen] / columns["by_steps"][seen]))) if seen.any() else None


def _share(values: NDArray[np.float64], chosen: NDArray[np.int64]) -> float | None:
    return _finite(float(values[chosen].sum() / values.sum())) if values.sum() > 0 else None


def _additive(measured: Mapping[str, Any], bits: str) -> dict[str, Any]:
    options = [row["options"][bits] for row in measured["layers"]]
    summed = mean_estimate(np.sum([option["squared_errors"] for option in options], axis=0))
    together = mean_estimate(measured["all"][bits]["squared_errors"])
    single = float(np.mean(np.sum([option["single_errors"] for option in options], axis=0)))
    single_together = float(np.mean(measured["all"][bits]["single_errors"]))
    return {
        "sum": summed.as_json(),
        "all": together.as_json(),
        "ratio": _ratio(together.value, summed.value),
        "single_sum": single,
        "single_all": single_together,
        "single_ratio": _ratio(single_together, single),
    }


def _ratio(above: float, below: float) -> float | None:
    return _finite(above / below) if below > 0 else None


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def decibels(squared_error: float | None) -> str:
    """A mean squared error of images in [0, 1] as PSNR, for people.

    >>> decibels(1e-4), decibels(0.0), decibels(None)
    ('40.0', 'inf', '-')
    """
    if squared_error is None:
        return "-"
    return f"{-10 * math.log10(squared_error):.1f}" if squared_error > 0 else "inf"


def ranking_text(results: Mapping[str, Any], most: int | None = None) -> str:
    """The ranking as aligned text for a terminal: the first `most` layers, then what all of them say."""
    ranked, widths = results["ranking"], list(results["all"])
    head = ["layer", "MB"]
    for bits in widths:
        head += [f"w{bits} end, dB", "(95 %)", f"w{bits} single", "rank end", "single", "centre t"]
    lines = [head, *(_cells(row, widths) for row in ranked["rows"][:most])]
    spans = [max(len(line[i]) for line in lines) for i in range(len(head))]
    table = [
        "  ".join(
            cell.ljust(span) if i == 0 else cell.rjust(span)
            for i, (cell, span) in enumerate(zip(line, spans, strict=True))
        ).rstrip()
        for line in lines
    ]
    if most is not None and len(ranked["rows"]) > most:
        table.append(f"... {len(ranked['rows']) - most} more in {results.get('file', 'the JSON file')}")
    return "\n".join([*table, "", *_conclusions(ranked, widths)])


def _cells(row: Mapping[str, Any], widths: Sequence[str]) -> list[str]:
    cells = [row["layer"], f"{row['float_bytes'] / 1e6:.3f}"]
    for bits in widths:
        option = row["options"][bits]
        end, centre = option["end"], option["centre"]
        low = max(end["low"] or 0.0, 0.0)
        cells += [
            decibels(end["value"]),
            f"{decibels(end['high'])} to {decibels(low)}",
            f"{option['single']:.2e}",
            str(option["rank_end"]),
            str(option["rank_single"]),
            "-" if centre is None else f"{centre:.0f}",
        ]
    return cells


def _conclusions(ranked: Mapping[str, Any], widths: Sequence[str]) -> list[str]:
    lines = [f"floor (float, another batch size): {decibels(ranked['floor']['value'])} dB", _steps(ranked)]
    for bits in widths:
        agree, top, additive = (ranked[key][bits] for key in ("agree", "top", "additive"))
        lines += [
            f"w{bits}: rank correlation with the end effect: single-evaluation error {_number(agree['single'])}, "
            f"weighted by what each step's error does to the image {_number(agree['by_steps'])}; a layer's end effect "
            f"is {_number(ranked['over_by_steps'][bits])} times that weighted sum (median)",
            f"w{bits}: the {top['layers']} layers of most single-evaluation error carry {_percent(top['of_single'])} "
            f"of it and {_percent(top['of_end'])} of the end effects; the {top['layers']} of most end effect "
            f"{_percent(top['of_end_at_best'])} ({top['in_common']} in common)",
            f"w{bits}: all layers at once {decibels(additive['all']['value'])} dB, the sum of one at a time "
            f"{decibels(additive['sum']['value'])} dB: together {_number(additive['ratio'])} of the sum",
        ]
    return lines


def _steps(ranked: Mapping[str, Any]) -> str:
    """Where evaluations err most, and where errors count most."""
    gains = [row for row in ranked["gains"] if row["gain"] is not None]
    total = sum(row["single"] for row in gains)
    if total <= 0:
        return "single evaluations have no error"
    worst, heaviest = (max(gains, key=lambda row: row[by]) for by in ("single", "gain"))
    return (
        f"steps: {_percent(worst['single'] / total)} of the single-evaluation error arises at "
        f"t = {worst['timestep']:g}, where {worst['gain']:.2g} of an error arrives in the image; "
        f"at t = {heaviest['timestep']:g}, {heaviest['gain']:.2g}"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"

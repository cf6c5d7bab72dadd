"""From measured cells to tables: means over calibration seeds, their intervals, differences from the base row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from octavo.evaluation.intervals import mean_estimate
from octavo.study.cells import Cell
from octavo.study.tables import Row, Table

COLUMNS: tuple[dict[str, str], ...] = (
    {"name": "psnr", "title": "PSNR to full precision, dB", "better": "higher"},
    {"name": "fd", "title": "FD to full precision", "better": "lower"},
    {"name": "fd_real", "title": "FD to real", "better": "lower"},
    {"name": "inception_score", "title": "IS", "better": "higher"},
    {"name": "sfd", "title": "sFD to full precision", "better": "lower"},
    {"name": "ssim", "title": "SSIM to full precision", "better": "higher"},
    {"name": "kid", "title": "KID to full precision", "better": "lower"},
    {"name": "psnr_pooled", "title": "pooled PSNR, dB", "better": "higher"},
    {"name": "precision", "title": "precision", "better": "higher"},
    {"name": "recall", "title": "recall", "better": "higher"},
    {"name": "sfd_real", "title": "sFD to real", "better": "lower"},
    {"name": "kid_real", "title": "KID to real", "better": "lower"},
    {"name": "precision_real", "title": "precision, to real", "better": "higher"},
    {"name": "recall_real", "title": "recall, to real", "better": "higher"},
)
LEVEL = 0.05
"""A cell's images differ from full precision's where the test's p-value is below it."""
COMPARED = ("psnr", "fd", "fd_real")

Measured = Mapping[str, Any]
Load = Callable[[Cell], "Measured | None"]


def tables_of(tables: Sequence[Table], seeds: int, load: Load) -> list[dict[str, Any]]:
    """Every table as JSON: a row's figures are means over the seeds that are measured, with 95 % t-intervals.

    `load(cell)`: what was measured, or None. A row none of whose cells is measured yet is "pending".
    """
    return [_table(table, seeds, load) for table in tables]


def summary(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean over seeds, its t-interval, and the values themselves; nulls where a value is not finite.

    >>> round(summary([1.0, 2.0, 3.0])["low"], 3)
    -0.484
    >>> summary([4.0])["low"], summary([None, 1.0])["value"]
    (None, None)
    """
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if len(finite) < len(values) or not values:
        return {"value": None, "low": None, "high": None, "method": "not finite", "values": list(values)}
    return {**mean_estimate(finite, of="calibration seeds").as_json(), "values": finite}


def _table(table: Table, seeds: int, load: Load) -> dict[str, Any]:
    measured = {row.label: _cells(row, seeds, load) for row in table.rows}
    base = measured.get(table.base or "", {})
    return {
        "name": table.name,
        "bits": table.bits,
        "title": table.title,
        "notes": list(table.notes),
        "base": table.base,
        "rows": [_row(table, row, measured, base) for row in table.rows],
    }


def _cells(row: Row, seeds: int, load: Load) -> dict[int, Measured]:
    """Seed -> what was measured, where it was."""
    if row.variant is None:
        return {}
    found = {seed: load(Cell(row.variant, seed)) for seed in range(seeds)}
    return {seed: measured for seed, measured in found.items() if measured is not None}


def _row(
    table: Table, row: Row, measured: Mapping[str, dict[int, Measured]], base: dict[int, Measured]
) -> dict[str, Any]:
    cells = measured[row.label]
    shown: dict[str, Any] = {
        "label": row.label,
        "kind": "quantized",
        "reason": row.reason,
        "how": sorted({cell["how"] for cell in cells.values()}),
        "seeds": len(cells),
        "figures": {},
        "against_base": {},
        "differs": sum((cell.get("p_same") or 0) < LEVEL for cell in cells.values()),
        "paper": row.paper.to_dict() if row.paper else None,
    }
    if row.reason:
        return {**shown, "kind": "not_applicable"}
    if row.variant is None:
        return {**shown, "kind": "reference", "figures": _of_reference(table, row, measured)}
    if not cells:
        return {**shown, "kind": "pending"}
    for column in COLUMNS:
        name = column["name"]
        if all(name in cell["figures"] for cell in cells.values()):
            shown["figures"][name] = summary([cell["figures"][name]["value"] for cell in cells.values()])
    if row.label != table.base:
        shown["against_base"] = _differences(cells, base)
    return shown


def _of_reference(
    table: Table, row: Row, measured: Mapping[str, dict[int, Measured]]
) -> dict[str, dict[str, Any]]:
    """Full precision's own figures, with their interval over images: there is one set of images, and no calibration."""
    for other in table.rows:
        if other.variant is not None and other.sampler == row.sampler:
            for cell in measured[other.label].values():
                return {
                    name: {**estimate, "values": [estimate["value"]]}
                    for name, estimate in cell["reference_figures"].items()
                }
    return {}


def _differences(cells: Mapping[int, Measured], base: Mapping[int, Measured]) -> dict[str, dict[str, Any]]:
    """Row minus base, seed by seed (both calibrated from the same noise), averaged over the seeds both have."""
    differences = {}
    for name in COMPARED:
        pairs = [
            (cells[seed]["figures"][name]["value"], base[seed]["figures"][name]["value"])
            for seed in sorted(cells.keys() & base.keys())
            if name in cells[seed]["figures"] and name in base[seed]["figures"]
        ]
        if pairs:
            differences[name] = summary([None if a is None or b is None else a - b for a, b in pairs])
    return differences

"""The study's JSON as the tables of the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.errors import OctavoError
from octavo.report.data import Row

COLUMNS = {
    "psnr": "PSNR to full precision, dB",
    "fd": "FD to full precision",
    "fd_real": "FD to real",
    "inception_score": "IS",
    "sfd": "sFD to full precision",
}


def study_tables(study: Mapping[str, Any]) -> Row:
    """Tables with their rows, cells and, for the first column, where on a common line each value lies.

    Raises `OctavoError` for what `octavo study` did not write.
    """
    try:
        return {
            "finished": bool(study.get("finished", True)),
            "tables": [_table(table) for table in study["tables"]],
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise OctavoError(f"study.json: is not what octavo study writes ({error}); run it again") from error


def _table(table: Mapping[str, Any]) -> Row:
    rows = table["rows"]
    names = [name for name in COLUMNS if any(name in row["figures"] for row in rows)]
    quantized = [row["figures"][names[0]] for row in rows if names and names[0] in row["figures"]]
    drawn = [figure for figure in quantized if figure["value"] is not None]
    low = min((_end(figure, "low") for figure in drawn), default=0.0)
    high = max((_end(figure, "high") for figure in drawn), default=1.0)
    return {
        "name": table["name"],
        "title": table["title"],
        "bits": table.get("bits", ""),
        "notes": list(table.get("notes", [])),
        "columns": [{"name": name, "title": COLUMNS[name]} for name in names],
        "drawn": len(drawn) > 1,
        "has_paper": any(row.get("paper") for row in rows),
        "rows": [_row(row, names, table.get("base"), low, max(high - low, 1e-9)) for row in rows],
    }


def _row(row: Mapping[str, Any], names: list[str], base: str | None, low: float, width: float) -> Row:
    figures = [row["figures"].get(name) for name in names]
    cells = [figure if figure and figure["value"] is not None else None for figure in figures]
    mark = None
    if cells and cells[0]:
        ends = {"low": _end(cells[0], "low"), "at": cells[0]["value"], "high": _end(cells[0], "high")}
        mark = {name: round(4 + 92 * (end - low) / width, 2) for name, end in ends.items()}
    told = {"pending": "not yet measured", "not_applicable": row.get("reason") or "does not apply"}
    return {
        "label": row["label"],
        "base": base is not None and row["label"] == base,
        "told": told.get(row.get("kind", ""), ""),
        "cells": cells,
        "mark": mark,
        "paper": _paper(row.get("paper")),
    }


def _end(figure: Mapping[str, Any], end: str) -> float:
    return float(figure["value"] if figure.get(end) is None else figure[end])


def _paper(figures: Mapping[str, Any] | None) -> str:
    if not figures:
        return ""
    note = f" ({figures['note']})" if figures.get("note") else ""
    return f"{figures['is']:.2f} / {figures['fid']:.2f} / {figures['sfid']:.2f}{note}"

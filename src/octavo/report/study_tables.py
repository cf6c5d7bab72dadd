"""The study's JSON as the charts and tables of the page."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from octavo.errors import OctavoError
from octavo.files import read_json
from octavo.fingerprint import versions
from octavo.report.charts import log_axis, range_chart
from octavo.report.data import RangeOverTime, ReportData, Row
from octavo.report.dots import dot, dot_axis
from octavo.study.markdown import SHOWN
from octavo.study.results import COLUMNS, COMPARED

AGAINST = "against"
"""Not a column of the study: the row's PSNR minus the base row's, seed by seed."""
TITLES = {column["name"]: column["title"] for column in COLUMNS} | {AGAINST: "PSNR against the base row, dB"}
BETTER = {column["name"]: column["better"] for column in COLUMNS} | {AGAINST: "higher"}
DRAWN = {**{name: SHOWN[name] for name in COMPARED}, AGAINST: "against base"}
PAPER_AXIS = replace(log_axis(18, 150), reverse=True)
"""Of the paper's FIDs: the same in every table, because some differ by little, and others by much."""
LAYERS = "activation_layers"


def read_study(path: Path) -> Any:
    """`study.json`, and under "activation_layers" what the file beside it, that it names, holds.

    Raises `OctavoError` for a file that cannot be read.
    """
    study = read_json(path)
    if not isinstance(study, dict) or not study.get("activations"):
        return study
    beside = path.parent / Path(str(study["activations"])).name
    return {**study, LAYERS: read_json(beside) if beside.is_file() else None}


def study_report(study: Any) -> ReportData:
    """A report of what `read_study` found, and of nothing else."""
    title = study.get("model", "a model") if isinstance(study, dict) else "a model"
    made = {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), **versions("octavo")}
    return ReportData(title=str(title), made=made, study=study)


def study_tables(study: Mapping[str, Any]) -> Row:
    """All that the page shows of a study: tables with their rows, dots and axes, and the activations over time.

    Raises `OctavoError` for what `octavo study` did not write.
    """
    try:
        seeds = study.get("options", {}).get("seeds", 0)
        return {
            "finished": bool(study.get("finished", True)),
            "facts": _facts(study),
            "command": study.get("made", {}).get("command", ""),
            "machine": _machine(study.get("made", {})),
            "choices": list(DRAWN.items()),
            "paper_axis": PAPER_AXIS,
            "tables": [_table(table, seeds) for table in study["tables"]],
            "activations": _activations(study[LAYERS]) if study.get(LAYERS) else None,
        }
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise OctavoError(f"study.json: is not what octavo study writes ({error!r}); run it again") from error


def _facts(study: Mapping[str, Any]) -> str:
    parts = []
    if options := study.get("options"):
        parts.append(
            f"{options['num_images']} images and {options['seeds']} calibration seeds a row, {options['samples']} "
            f"calibration pairs, features: {options['features']}"
        )
    if cells := study.get("cells"):
        hours = cells["seconds"] / 3600
        time = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"
        parts.append(f"{cells['done']} of {cells['planned']} cells measured in {time}")
    return "; ".join(parts)


def _machine(made: Mapping[str, Any]) -> str:
    """Where and with what the study was made."""
    parts = [made["machine"], f"{made['threads']} threads"] if made else []
    return ", ".join([*parts, *(f"{name} {version}" for name, version in made.get("versions", {}).items())])


def _table(table: Mapping[str, Any], seeds: int) -> Row:
    rows = table["rows"]
    bits, base = table.get("bits", ""), table.get("base")
    charts = {name: _chart(name, rows, base) for name in DRAWN}
    how = sorted({how for row in rows for how in row["how"]})
    return {
        "id": "-".join(filter(None, (table["name"], bits))),
        "name": table["name"],
        "title": table["title"],
        "bits": bits,
        "notes": [*table["notes"], *([f"Executed as: {', '.join(how)}."] if how else [])],
        "measured": any(charts.values()),
        "charts": charts,
        "columns": [
            {"name": name, "head": head, "title": TITLES[name]}
            for name, head in {**SHOWN, AGAINST: "against base, dB"}.items()
            if any(_known(row, name) for row in rows)
        ],
        "published": any(row["paper"] for row in rows),
        "rows": [_row(row, base, charts, seeds) for row in rows],
    }


def _chart(name: str, rows: Sequence[Mapping[str, Any]], base: str | None) -> Row | None:
    known = {row["label"]: figure for row in rows if (figure := _known(row, name))}
    if not known:
        return None
    if name == AGAINST:
        known[str(base)] = {"value": 0.0}
    axis = dot_axis(list(known.values()), BETTER[name])
    return {
        "title": TITLES[name],
        "axis": axis,
        "base_at": axis.at(known[base]["value"]) if base in known else None,
        "dots": {label: dot(figure, axis) for label, figure in known.items()},
    }


def _row(row: Mapping[str, Any], base: str | None, charts: Mapping[str, Row | None], seeds: int) -> Row:
    told = {
        "pending": "not yet measured",
        "not_applicable": f"does not apply: {row['reason']}",
        "reference": "the reference",
    }
    paper, measured = row["paper"], row["seeds"]
    return {
        "label": row["label"],
        "base": base is not None and row["label"] == base,
        "reference": row["kind"] == "reference",
        "told": told.get(row["kind"], ""),
        "so_far": f"{measured} of {seeds} seeds" if 0 < measured < seeds else "",
        "figures": {name: _known(row, name) for name in TITLES},
        "endless": [name for name in TITLES if _figure(row, name) and not _known(row, name)],
        "dots": {name: chart["dots"].get(row["label"]) if chart else None for name, chart in charts.items()},
        "paper": {**paper, "at": PAPER_AXIS.at(paper["fid"])} if paper else None,
    }


def _known(row: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """The row's figure, or None where it has none, or one that is not finite."""
    figure = _figure(row, name)
    return figure if figure and figure["value"] is not None else None


def _figure(row: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    figure: Mapping[str, Any] | None = (
        row["against_base"].get("psnr") if name == AGAINST else row["figures"].get(name)
    )
    return figure


def _activations(found: Mapping[str, Any]) -> Row:
    """Charts of the layers worth showing, and how much the ranges of all of them drift."""
    drifts = sorted((layer["drift"], layer["layer"]) for layer in found["layers"])
    shown = [
        RangeOverTime(
            **{name: layer[name] for name in RangeOverTime.__dataclass_fields__ if name != "quantiles"},
            quantiles=layer["quantile_values"],
        )
        for layer in found["layers"]
        if layer["layer"] in found["worth_showing"]
    ]
    return {
        "sampler": found["sampler"],
        "num_images": found["num_images"],
        "count": len(drifts),
        "middle": drifts[len(drifts) // 2][0],
        "least": drifts[0],
        "most": drifts[-1],
        "ranges": [(one, range_chart(one)) for one in shown],
    }

"""The report as one HTML page that asks for nothing: styles, script and images are inside."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from dataclasses import asdict
from pathlib import Path
from typing import Any

from octavo.errors import OctavoError
from octavo.files import atomic_path
from octavo.places import check_file_place
from octavo.report import charts
from octavo.report.colours import gradient
from octavo.report.cost import cost_rows, whole_images
from octavo.report.data import Figure, ReportData, Row
from octavo.report.front import front_svg
from octavo.report.pictures import heat_map
from octavo.report.study_tables import study_tables
from octavo.report.words import FILTERS, audit_line, checks, distribution, headline
from octavo.study.tune_report import choice_name, not_excluded

SECTIONS = {
    "verdict": "Verdict",
    "images": "Images",
    "cost": "Cost",
    "quality": "Quality and time",
    "layers": "Error by layer",
    "ranges": "Ranges",
    "calibration": "Calibration",
    "audit": "Audit",
    "study": "Study",
    "tuning": "Tuning",
    "use": "Recipe and loading",
}
LEAST_ROW, MOST_ROW, MAP_HEIGHT = 3, 14, 480
"""Pixels of one layer's row in the heat map, and what the whole map should come to."""
LABEL_HEIGHT = 15


def to_html(data: ReportData) -> str:
    """The page. It makes no request: its Content-Security-Policy forbids all but `data:` images and its own script.

    Everything that comes from the model (names, recipes) is escaped. Raises `OctavoError` without jinja2.
    """
    page = _environment().get_template("report.html.j2").render(**_context(data))
    return "\n".join(line.rstrip() for line in page.splitlines()) + "\n"


def save_report(data: ReportData, out: Path) -> None:
    """Write the page, whole or not at all. Raises `OctavoError` for a place that takes no file, before it renders."""
    check_report_place(out)
    page = to_html(data)
    with atomic_path(out) as temporary:
        temporary.write_text(page, encoding="utf-8")


def check_report_place(out: Path) -> None:
    """Raise `OctavoError` if no page can be written at `out`."""
    check_file_place(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise OctavoError(f"{out}: a report is one page; give a name that ends in .html")
    if out.is_dir():
        raise OctavoError(f"{out}: is a folder; choose another name")


def _environment() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise OctavoError(f"jinja2 cannot be imported ({error}): pip install jinja2") from error
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_text), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(FILTERS)
    return environment


def _text(name: str) -> str:
    return (importlib.resources.files("octavo") / "report" / "templates" / name).read_text(encoding="utf-8")


def _context(data: ReportData) -> Row:
    """What the template is handed: the data, and all that is worked out from it."""
    from markupsafe import Markup

    script = "\n".join(line.rstrip() for line in _text("report.js").splitlines())
    style = f":root {{ --gradient: {gradient()}; }}\n{_text('report.css')}"
    context: Row = {
        "data": data,
        "script": Markup(script),
        "script_digest": Markup(base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()),
        "style": Markup(style),
        "ours": _bits(data),
        "headline": headline(data),
        "kicker": _kicker(data),
        "checks": checks(data),
        "costs": cost_rows(data),
        "whole": whole_images(data.trade_off),
        "has_reference": any(figure.reference for figure in data.figures),
        "methods": _methods(data.figures),
        "trade_off": charts.trade_off_chart(data.trade_off),
        "most_steps": max((point.steps for point in data.trade_off), default=0),
        "ranges": [(found, charts.range_chart(found)) for found in data.ranges],
        "calibration": charts.calibration_chart(data.calibration) if data.calibration else None,
        "distribution": distribution(data.calibration.distribution) if data.calibration else "",
        "kernels": charts.kernels(data.audit),
        "audit_line": audit_line(data),
        "rug": charts.rug(data.gallery.psnr_values) if data.gallery else None,
        "recipe": _recipe(data),
        "study": study_tables(data.study) if data.study else None,
        "front": Markup(front_svg(data.tuning)) if data.tuning else None,
        "worse": not_excluded(data.tuning) if data.tuning and data.tuning.get("verification") else "",
        "front_rows": [(choice_name(row), row) for row in data.tuning["front"]] if data.tuning else [],
        **(_map(data) if data.errors else {}),
    }
    present = {
        "verdict": data.verdict,
        "images": data.gallery,
        "cost": data.cost,
        "quality": data.figures or data.trade_off,
        "layers": data.errors,
        "ranges": data.ranges,
        "calibration": data.calibration,
        "audit": data.audit,
        "study": data.study,
        "tuning": data.tuning,
        "use": data.loading or data.recipe,
    }
    context["sections"] = []
    for name, text in SECTIONS.items():
        if present[name]:
            context["sections"].append((name, text, False))
            context["sections"] += _study_parts(context["study"]) if name == "study" else []
    return context


def _study_parts(study: Row) -> list[tuple[str, str, bool]]:
    """The study's tables for the contents, below "Study"."""
    parts = [(table["id"], f"{table['name']} {table['bits']}".strip(), True) for table in study["tables"]]
    return [*parts, ("activations", "Activations", True)] if study["activations"] else parts


def _map(data: ReportData) -> Row:
    errors = data.errors
    assert errors is not None
    low, high = charts.error_scale(errors)
    count = len(errors.layers)
    row = min(max(MAP_HEIGHT / count, LEAST_ROW), MOST_ROW)
    blocks = [
        {
            "name": group["name"],
            "top": round(100 * group["first"] / count, 3),
            "height": round(100 * group["rows"] / count, 3),
            "fits": group["rows"] * row >= LABEL_HEIGHT,
        }
        for group in charts.block_groups(errors.layers)
    ]
    return {
        "errors_json": asdict(errors),
        "error_low": low,
        "error_high": high,
        "map_height": round(row * count),
        "map_network": heat_map(errors, low, high, list(range(count))),
        "map_worst": heat_map(errors, low, high, errors.worst),
        "blocks": blocks,
        "worst_layers": charts.mean_errors(errors),
    }


def _bits(data: ReportData) -> str:
    """What the quantized model is called beside full precision: int8, or its bits where they are others."""
    weights, activations = (data.recipe.get(name, 8) for name in ("weights", "activations"))
    return "int8" if (weights, activations) == (8, 8) else f"W{weights}A{activations}"


def _kicker(data: ReportData) -> list[str]:
    made = data.made
    parts = [made.get("pipeline"), made.get("engine")]
    if made.get("scheduler") and made.get("steps"):
        parts.append(f"{made['scheduler']}, {made['steps']} steps")
    return [str(part) for part in (*parts, made.get("date")) if part]


def _methods(figures: list[Figure]) -> str:
    """How the intervals were made, each method once, with the figures that it serves."""
    by_method: dict[str, list[str]] = {}
    for figure in figures:
        if figure.quantized.method:
            by_method.setdefault(figure.quantized.method, []).append(figure.name)
    told = "; ".join(f"{', '.join(names)}: {method}" for method, names in by_method.items())
    return f"Intervals. {told}." if told else ""


def _recipe(data: ReportData) -> list[tuple[str, str]]:
    """The recipe and the calibration's facts as label and text."""
    rows = []
    for key, value in {**data.recipe, **data.how_calibrated}.items():
        text = distribution(value) if key == "timesteps" and isinstance(value, dict) else _plain(value)
        rows.append((key.replace("_", " "), text))
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items()) or "none"
    return str(value)

"""The study as Markdown: our tables with intervals, the paper's numbers beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHOWN = {
    "psnr": "PSNR, dB",
    "fd": "FD to fp",
    "fd_real": "FD to real",
    "inception_score": "IS",
    "sfd": "sFD to fp",
    "sfd_real": "sFD to real",
}
HEADER = """\
Means over calibration seeds with 95 % t-intervals over them; full precision's own figures have intervals over images.
PSNR, FD and sFD "to fp" compare with the full-precision images of the same seeds. "differs": calibration seeds whose
images differ from full precision's (permutation test, p < 0.05). "against": the difference in PSNR from the table's
base row, seed by seed.

FD to real and IS are what the paper prints: quantization noise can improve them, so read them beside the distances to
full precision. All FDs of N images are too large by about c / N, with a c that depends on the row: compare rows of one
page, not pages. The images are the same in every cell, so intervals hold the luck of calibration alone; other images
would move FD to real of all rows by about as much as full precision's own interval says. The paper prints IS / FID /
sFID of Inception features on ImageNet 64x64: only its order can be compared with ours."""


def study_markdown(study: Mapping[str, Any]) -> str:
    """`study.json` (and `activations.json` under "activation_layers", where given) as Markdown."""
    options, cells = study["options"], study["cells"]
    lines = [f"# Study of {study['model']}", "", HEADER, ""]
    lines.append(
        f"{options['num_images']} images a cell, {options['seeds']} calibration seeds, {options['samples']} "
        f"calibration pairs, features: {options['features']}. {cells['done']} of {cells['planned']} cells measured, "
        f"{cells['seconds'] / 60:.1f} minutes."
    )
    if not study["finished"]:
        lines += ["", "**Not finished**: the same command goes on where it stopped."]
    for table in study["tables"]:
        lines += ["", f"## {table['name']} {table['title']}, {table['bits']}", "", *_table(table)]
    layers = study.get("activation_layers")
    if layers:
        lines += ["", "## Activations over time (figure 3)", "", *_activations(layers)]
    return "\n".join(lines) + "\n"


def _table(table: Mapping[str, Any]) -> list[str]:
    rows = table["rows"]
    names = [name for name in SHOWN if any(name in row["figures"] for row in rows)]
    with_base = any(row["against_base"] for row in rows)
    with_test = any(row["seeds"] for row in rows)
    with_paper = any(row["paper"] for row in rows)
    heads = ["", *(SHOWN[name] for name in names)]
    heads += ["differs"] * with_test + ["against, dB"] * with_base + ["paper: IS / FID / sFID"] * with_paper
    lines = [_line(heads), _line(["---"] * len(heads))]
    for row in rows:
        cells = [_label(row, table["base"])]
        if row["kind"] in ("not_applicable", "pending"):
            told = "not yet measured" if row["kind"] == "pending" else f"does not apply: {row['reason']}"
            cells += [told] + [""] * (len(names) - 1) if names else [told][: len(heads) - 1]
        else:
            cells += [_figure(row["figures"].get(name)) for name in names]
        cells += [f"{row['differs']} of {row['seeds']}" if row["seeds"] else ""] * with_test
        cells += [_figure(row["against_base"].get("psnr"), signed=True)] * with_base
        cells += [_paper(row["paper"])] * with_paper
        lines.append(_line(cells))
    how = sorted({how for row in rows for how in row["how"]})
    notes = [*table["notes"], f"Executed as: {', '.join(how)}."] if how else table["notes"]
    return [*lines, "", *notes]


def _activations(layers: Mapping[str, Any]) -> list[str]:
    drifts = sorted((layer["drift"], layer["layer"]) for layer in layers["layers"])
    middle = drifts[len(drifts) // 2][0]
    lines = [
        f"Width of a layer's input (0.1 % to 99.9 %) at its widest step over its narrowest, {layers['sampler']}: "
        f"median {middle:.2f} over {len(drifts)} layers, least {drifts[0][0]:.2f}, most {drifts[-1][0]:.2f} "
        f"({drifts[-1][1]}). All quantiles: activations.json.",
        "",
        _line(["layer", "drift", "width, noisy end to clean end", "most saturated"]),
        _line(["---"] * 4),
    ]
    for layer in layers["layers"]:
        if layer["layer"] in layers["worth_showing"]:
            widths = [values[-1] - values[0] for values in layer["quantile_values"]]
            course = " ".join(f"{width:.3g}" for width in widths)
            saturated = f"{100 * max(layer['outside']):.2g} %"
            lines.append(_line([f"`{layer['layer']}`", f"{layer['drift']:.2f}", course, saturated]))
    return lines


def _label(row: Mapping[str, Any], base: str | None) -> str:
    return f"**{row['label']}** (base)" if row["label"] == base else row["label"]


def _figure(figure: Mapping[str, Any] | None, signed: bool = False) -> str:
    """ "50.1 (48.9 to 51.3)", with as many decimals as a reader can use."""
    if figure is None or figure["value"] is None:
        return "" if figure is None else "not finite"
    decimals = _decimals(figure["value"])
    sign = "+" if signed else ""
    if figure["low"] is None:
        return f"{figure['value']:{sign}.{decimals}f}"
    ends = " to ".join(f"{figure[end]:{sign}.{decimals}f}" for end in ("low", "high"))
    return f"{figure['value']:{sign}.{decimals}f} ({ends})"


def _decimals(value: float) -> int:
    return 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 4


def _paper(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return ""
    note = f" ({figures['note']})" if figures["note"] else ""
    return f"{figures['is']:.2f} / {figures['fid']:.2f} / {figures['sfid']:.2f}{note}"


def _line(cells: list[str]) -> str:
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"

"""What both models cost, side by side: measured for the report, and as the rows of its table."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from octavo.diffusion import first_call
from octavo.errors import OctavoError
from octavo.evaluation.cost import MODEL, REFERENCE, Cost, latency, static_cost
from octavo.evaluation.peak_memory import MemoryJob, peak_memory
from octavo.report.data import ReportData, Row, TradeOffPoint
from octavo.report.words import FILTERS, significant
from octavo.runtimes import executor_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

NOT_MEASURED = "not measured"
UNMEASURABLE = (OctavoError, OSError, TypeError, ValueError)
"""Of memory: another system than Linux, no room for the copies, inputs that JSON cannot hold."""
megabytes = FILTERS["megabytes"]


def measure_costs(
    quantized: DiffusionPipeline,
    ours: DiffusionPipeline,
    original: DiffusionPipeline,
    *,
    batch_size: int,
    inputs: Mapping[str, Any] | None,
    rounds: int,
    own_reference: bool,
) -> dict[str, Cost]:
    """MODEL's and REFERENCE's cost. `ours` is `quantized` on its runtime.

    Time and memory are those of real integers: in simulation neither is measured. Where `own_reference` is False,
    `original` is no model that anybody loads, so its memory is not measured.
    """
    costs = {MODEL: static_cost(quantized, inputs), REFERENCE: static_cost(original, inputs)}
    executor = executor_of(ours)
    if executor is None:
        return costs
    rows = latency(ours, original, first_call(original, batch_size=batch_size, inputs=inputs), rounds=rounds)
    costs = {name: replace(cost, latency=row) for (name, cost), row in zip(costs.items(), rows, strict=True)}
    shared: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "inputs": dict(inputs or {}),
    }
    precision = next(graph.precision for graph in executor.graphs.values())
    jobs = {MODEL: (quantized, {"runtime": executor.runtime, "precision": precision, **shared})}
    if own_reference:
        jobs[REFERENCE] = (original, shared)
    for name, (peak, libraries) in peak_memories(jobs).items():
        costs[name] = replace(costs[name], peak_memory_bytes=peak, libraries_memory_bytes=libraries)
    return costs


def peak_memories(jobs: Mapping[str, tuple[DiffusionPipeline, dict[str, Any]]]) -> dict[str, tuple[int, int]]:
    """Peak memory of each, in a fresh process that loads a copy saved for it; nothing where that cannot be done."""
    with tempfile.TemporaryDirectory(prefix="octavo-memory-") as folder:
        try:
            for name, (pipeline, _) in jobs.items():
                pipeline.save_pretrained(Path(folder) / name)
            found = peak_memory(
                [MemoryJob(str(Path(folder) / name), **settings) for name, (_, settings) in jobs.items()]
            )
        except UNMEASURABLE:
            return {}
    return dict(zip(jobs, found, strict=True))


def whole_images(points: list[TradeOffPoint]) -> tuple[TradeOffPoint, TradeOffPoint] | None:
    """Ours and the reference's time of an image at all steps, or None where it was not measured."""
    most = [point for point in points if point.steps == max(other.steps for other in points)]
    theirs = next((point for point in most if point.psnr is None), None)
    ours = next((point for point in most if point.psnr is not None), None)
    return (ours, theirs) if ours and theirs else None


def cost_rows(data: ReportData) -> list[Row]:
    """The table's rows: what, both models' figures with their spread, and what ours is of the reference's."""
    if not data.cost:
        return []
    ours, theirs = data.cost[MODEL], data.cost[REFERENCE]
    batch = data.verdict.batch_size if data.verdict else 1
    component = data.made.get("component", "denoiser")
    rows = [
        _row(f"Size of the {component}", "", ours["bytes"], theirs["bytes"], megabytes),
        _row("Bit operations", "one evaluation, one image", ours["bops"], theirs["bops"], _giga),
    ]
    network = "The network alone", f"one evaluation, batch of {batch}"
    if ours["latency"] and theirs["latency"]:
        row = _row(*network, ours["latency"]["ms"], theirs["latency"]["ms"], _milliseconds)
        for side, timed in (("ours", ours["latency"]), ("theirs", theirs["latency"])):
            row[f"{side}_span"] = f"{significant(timed['ms_low'], 3)} to {significant(timed['ms_high'], 3)}"
        row["share"] = 100 / ours["latency"]["ratio"]  # round by round, as the verdict has it
        rows.append(row)
    else:
        rows.append(_row(*network, None, None, _milliseconds))
    whole = whole_images(data.trade_off)
    if whole:
        seconds = [1e3 * point.seconds.value for point in whole]
        told = f"{whole[0].steps} steps, sampler included, of a batch of {whole[0].batch_size}"
        rows.append(_row("A whole image", told, seconds[0], seconds[1], _milliseconds))
    memory = _row(
        "Peak memory",
        f"a fresh process, batch of {batch}",
        ours["peak_memory_bytes"],
        theirs["peak_memory_bytes"],
        _whole_megabytes,
    )
    for side, cost in (("ours", ours), ("theirs", theirs)):
        if cost["libraries_memory_bytes"]:
            memory[f"{side}_span"] = f"{_whole_megabytes(cost['libraries_memory_bytes'])} libraries"
    return [*rows, memory]


def _row(name: str, note: str, ours: float | None, theirs: float | None, text: Any) -> Row:
    return {
        "name": name,
        "note": note,
        "ours": NOT_MEASURED if ours is None else text(ours),
        "theirs": NOT_MEASURED if theirs is None else text(theirs),
        "ours_span": "",
        "theirs_span": "",
        "share": 100 * ours / theirs if ours and theirs else None,
    }


def _whole_megabytes(count: float) -> str:
    return f"{count / 1e6:.0f} MB"


def _giga(count: float) -> str:
    return f"{significant(count / 1e9, 3)} G"


def _milliseconds(time: float) -> str:
    return f"{significant(time, 3)} ms" if time < 1e4 else f"{significant(time / 1e3, 3)} s"

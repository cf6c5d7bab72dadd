"""Choose the precision of the float remainder: bf16 where this machine gains enough from it."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.errors import OctavoError
from octavo.files import read_json, write_json

if TYPE_CHECKING:
    import openvino

CHOICES = ("f32", "bf16")
BF16_GAIN = 1.05
"""bf16 is chosen for the float remainder only where it is at least this much faster: it adds bf16's own error."""


def has_bf16(core: openvino.Core) -> bool:
    """Whether this CPU computes in bf16; asked for it elsewhere, OpenVINO computes in f32 without a word."""
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def faster_precision(
    core: openvino.Core, evaluation_in: Callable[[str], Callable[[], Any]], record: Path | None
) -> str:
    """bf16 if an evaluation is `BF16_GAIN` faster in it than in f32, else f32.

    `evaluation_in(precision)` compiles the network and returns what evaluates it. What was measured is remembered
    in `record` (its name is given the processor's); a damaged record is measured again. None remembers nothing.
    """
    if not has_bf16(core):
        return "f32"
    if record is not None:
        processor = str(core.get_property("CPU", "FULL_DEVICE_NAME")).encode()
        record = record.with_name(f"{record.stem}-{hashlib.sha256(processor).hexdigest()[:8]}.json")
        if (remembered := _remembered(record)) is not None:
            return remembered
    milliseconds = measured(evaluation_in)
    precision = "bf16" if milliseconds["f32"] > BF16_GAIN * milliseconds["bf16"] else "f32"
    if record is not None:
        write_json(record, {"precision": precision, "milliseconds": milliseconds})
    return precision


def measured(evaluation_in: Callable[[str], Callable[[], Any]]) -> dict[str, float]:
    """Median milliseconds of an evaluation in each precision, in turns; the first turn only warms up."""
    evaluations = {name: evaluation_in(name) for name in CHOICES}
    times: dict[str, list[float]] = {name: [] for name in CHOICES}
    for _ in range(7):
        for name, evaluate in evaluations.items():
            start = time.perf_counter()
            evaluate()
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values[1:]) for name, values in times.items()}


def _remembered(record: Path) -> str | None:
    if not record.is_file():
        return None
    try:
        precision = read_json(record)["precision"]
    except (OctavoError, TypeError, KeyError):  # damaged: what is in it can be measured again
        return None
    return precision if precision in CHOICES else None

"""ONNX Runtime on the CPU: a graph checked, loaded with its audit, and evaluated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from octavo.errors import OctavoError
from octavo.runtimes.audit import AuditRow
from octavo.runtimes.calls import Call
from octavo.runtimes.convert import first_line
from octavo.runtimes.onnx_audit import audit_optimized
from octavo.runtimes.saturation import adds_in_16_bits

if TYPE_CHECKING:
    import onnxruntime

EXACT = {"session.x64quantprecision": "1"}
"""By this ONNX Runtime takes kernels that do not add in 16 bits, which it else does on CPUs without VNNI."""


def check_graph(path: Path) -> None:
    """Raise `OctavoError` unless onnx's own checker accepts it, shapes and types of every operation included."""
    import onnx

    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise _refusal(path, "onnx's checker refuses it", error) from error


def session(
    path: Path, temporary: Path, layers: Iterable[str], threads: int | None = None
) -> tuple[onnxruntime.InferenceSession, list[AuditRow]]:
    """The graph of `path` loaded, and which kernels run `layers` (`octavo.runtimes.audit.audited`).

    `temporary`: a folder for the optimized graph, which the audit reads. `threads`: None leaves it to the engine.
    Raises `OctavoError` where ONNX Runtime does not load it.
    """
    import onnxruntime

    optimized = temporary / "optimized.onnx"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = (
        4  # else it prints what it raises, and that optimized graphs are for this machine
    )
    options.intra_op_num_threads = threads or 0
    options.optimized_model_filepath = str(optimized)
    entries = {"session.optimized_model_external_initializers_file_name": "optimized.bin"}
    if adds_in_16_bits():
        entries |= EXACT
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    try:
        loaded = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its kinds have nothing in common
        raise _refusal(path, "ONNX Runtime cannot load it", error) from error
    return loaded, audit_optimized(optimized, layers)


def _refusal(path: Path, what: str, error: Exception) -> OctavoError:
    return OctavoError(
        f"{path.name}: {what} ({first_line(error)}); sample it by OpenVINO or in torch, and report it"
    )


def infer(loaded: onnxruntime.InferenceSession, call: Call, parts: int = 1) -> list[NDArray[Any]]:
    """The outputs for all rows of `call`, in memory of their own.

    `parts`: into so many equal parts the rows are cut, which are evaluated side by side, each by a thread of its own.
    """
    if parts == 1:
        return _run(loaded, call.names, call.tensors)
    with ThreadPoolExecutor(parts) as threads:
        pieces = threads.map(lambda k: _run(loaded, call.names, call.part(k, parts)), range(parts))
        return [np.concatenate(outputs) for outputs in zip(*pieces, strict=True)]


def _run(
    loaded: onnxruntime.InferenceSession, names: Sequence[str], tensors: Sequence[torch.Tensor]
) -> list[NDArray[Any]]:
    read = {port.name for port in loaded.get_inputs()}
    named = dict(zip(names, tensors, strict=True))
    inputs = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in named.items() if name in read}
    outputs: list[NDArray[Any]] = loaded.run(None, inputs)
    return outputs

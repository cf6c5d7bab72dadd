"""A denoiser traced by torch, and what torch's exporter makes of the trace, in ONNX.

What the exporter gets wrong or cannot do is put right on the way: `octavo.runtimes.onnx_complex`, `onnx_repairs`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from octavo.errors import OctavoError
from octavo.runtimes.calls import Call
from octavo.runtimes.convert import TRACE_ROWS, FixedRows, Traceable, first_line
from octavo.runtimes.onnx_complex import fold_complex_constants
from octavo.runtimes.onnx_patterns import OPSET, translations
from octavo.runtimes.onnx_repairs import repaired_translations


def program_of(denoiser: nn.Module, call: Call, dynamic_rows: bool) -> Any:
    """torch's `ONNXProgram` of `denoiser` as `call` calls it, in opset 20.

    `dynamic_rows`: for any number of rows; `FixedRows` is raised for a network that makes constants of theirs. Raises
    `OctavoError` where torch cannot trace or export it.
    """
    with torch.inference_mode(False), torch.no_grad(), quiet():
        try:
            return _converted(_traced(denoiser, call, dynamic_rows), call)
        except OctavoError:
            raise
        except Exception as error:  # torch raises many kinds; each means that this network cannot be exported
            raise OctavoError(
                f"{type(denoiser).__name__}: torch cannot export it to ONNX "
                f"({first_line(_innermost(error))}); sample it by OpenVINO or in torch"
            ) from error


def _traced(denoiser: nn.Module, call: Call, dynamic_rows: bool) -> torch.export.ExportedProgram:
    shapes = call.row_dynamic_shapes()
    dynamic = [{0: torch.export.Dim.AUTO} if -1 in shape else {} for shape in shapes]
    exported = torch.export.export(
        Traceable(denoiser, call, pairs=False).eval(),  # `onnx_complex` and the exporter see to those
        tuple(call.batched(TRACE_ROWS) if dynamic_rows else call.tensors),
        dynamic_shapes={"tensors": tuple(dynamic)} if dynamic_rows else None,
        strict=False,
    )
    inputs = exported.graph_signature.user_inputs
    values = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
    for name, input_name, shape in zip(call.names, inputs, shapes, strict=True):
        if dynamic_rows and -1 in shape and is_concrete_int(values[input_name].shape[0]):
            raise FixedRows(
                f"{name}: {type(denoiser).__name__} is exported for {TRACE_ROWS} rows alone; give a batch size"
            )
    fold_complex_constants(exported)
    return exported


def _converted(exported: torch.export.ExportedProgram, call: Call) -> Any:
    return torch.onnx.export(
        exported,
        dynamo=True,
        opset_version=OPSET,
        input_names=list(call.names),
        output_names=["output"],
        custom_translation_table={**repaired_translations(), **translations()},
        optimize=True,
        verbose=False,
    )


def _innermost(error: BaseException) -> BaseException:
    """What torch's exporter wrapped in one report after another."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def quiet() -> Iterator[None]:
    """torch.onnx prints and warns about itself, not about the network."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

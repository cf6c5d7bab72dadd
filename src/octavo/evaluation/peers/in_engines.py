"""Peers in other engines: OpenVINO float, NNCF's int8, ONNX Runtime float and int8."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from octavo.evaluation.peers.task import Engine, OfTensors, OnThreads, Task, numpy_inputs
from octavo.evaluation.speed import take_turns
from octavo.runtimes.convert import to_openvino
from octavo.runtimes.core import openvino_core, own_stack
from octavo.runtimes.streams import Streams, engine_threads, equal_parts

OPSET = 20


def openvino_float(task: Task, precision: str) -> Engine:
    """The float network as OpenVINO converts it, whole or cut as Octavo cuts its own."""
    return _openvino(task, _static(task, to_openvino(task.denoiser, task.call)), precision)


def nncf_int8(task: Task, precision: str, hint: str) -> Engine:
    """NNCF's post-training int8 of the same graph by one of its hints, whole or cut as Octavo cuts its own.

    `hint`: one of its presets, or "transformer", the kind of model for which it smooths activations.
    """
    import nncf

    batches = [numpy_inputs(Task(task.denoiser, kwargs, ()).call) for kwargs in task.calibration]
    model = _static(task, to_openvino(task.denoiser, task.call))
    hinted: dict[str, Any] = (
        {"model_type": nncf.ModelType.TRANSFORMER}
        if hint == "transformer"
        else {"preset": nncf.QuantizationPreset(hint)}
    )
    # its progress is not what `--json` prints, and it makes cores
    with contextlib.redirect_stdout(sys.stderr), own_stack():
        model = nncf.quantize(
            model,
            nncf.Dataset(batches),
            **hinted,
            subset_size=len(batches),
            fast_bias_correction=True,
        )
    return _openvino(task, model, precision)


def onnxruntime_float(task: Task) -> Engine:
    """The network exported to ONNX by torch, in ONNX Runtime's CPU provider."""
    with tempfile.TemporaryDirectory() as folder:
        return _onnxruntime(task, _onnx(task, Path(folder)))


def onnxruntime_int8(task: Task) -> Engine:
    """The same, quantized statically by ONNX Runtime's own quantizer (QDQ, int8 weights per channel)."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    names = _names(task)

    class Reader(CalibrationDataReader):  # type: ignore[misc,unused-ignore]
        def __init__(self) -> None:
            calls = [Task(task.denoiser, kwargs, ()).call for kwargs in task.calibration]
            self.batches = iter([dict(zip(names, numpy_inputs(call), strict=True)) for call in calls])

        def get_next(self) -> Any:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("prepared.onnx", "int8.onnx")]
        quant_pre_process(str(_onnx(task, Path(folder))), paths[0])
        quantize_static(paths[0], paths[1], Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
        return _onnxruntime(task, Path(paths[1]))


def _static(task: Task, model: Any) -> Any:
    import openvino

    shapes = zip(model.inputs, task.call.shapes, strict=True)
    model.reshape({port: openvino.PartialShape(list(shape)) for port, shape in shapes})
    return model


def _openvino(task: Task, model: Any, precision: str) -> Engine:
    """The batch whole or in the parts that Octavo cuts its own into, whichever is faster here."""
    parts = equal_parts(task.call.rows, engine_threads(task.threads))
    return faster([_streams(task, model, precision, parts) for parts in sorted({1, parts})])


def _streams(task: Task, model: Any, precision: str, parts: int) -> Engine:
    import openvino

    call = task.call
    shapes = [list(tensor.shape) for tensor in call.part(0, parts)]
    model.reshape(
        {port: openvino.PartialShape(shape) for port, shape in zip(model.inputs, shapes, strict=True)}
    )
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": parts,
    }
    if task.threads is not None:
        settings["INFERENCE_NUM_THREADS"] = task.threads
    compiled = openvino_core().compile_model(model, "CPU", settings)
    streams = Streams(compiled, parts)
    return OnThreads(lambda: streams.infer(call), int(compiled.get_property("INFERENCE_NUM_THREADS")))


def faster(engines: list[Engine], rounds: int = 3) -> Engine:
    """The one with the shortest run of `rounds`, in turn, after one that is not counted."""
    if len(engines) == 1:
        return engines[0]
    timings = take_turns({str(k): engine for k, engine in enumerate(engines)}, rounds=rounds, warm_up=1)
    return engines[min(range(len(engines)), key=lambda k: min(timings[str(k)].seconds))]


def _names(task: Task) -> list[str]:
    return [name.replace(".", "_") for name in task.call.names]


def _onnx(task: Task, folder: Path) -> Path:
    path = folder / "float.onnx"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            OfTensors(task.denoiser, task.call).eval(),
            task.call.tensors,
            str(path),
            input_names=_names(task),
            opset_version=OPSET,
            dynamo=False,
        )
    return path


def _onnxruntime(task: Task, path: Path) -> Engine:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    if task.threads is not None:
        settings.intra_op_num_threads = task.threads
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    wanted = {port.name for port in session.get_inputs()}
    given = dict(zip(_names(task), numpy_inputs(task.call), strict=True))
    given = {name: array for name, array in given.items() if name in wanted}
    return OnThreads(lambda: session.run(None, given), settings.intra_op_num_threads)

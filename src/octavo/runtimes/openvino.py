"""A denoiser executed by OpenVINO: one compiled graph per input shape, audited, cached on disk."""

from __future__ import annotations

import hashlib
import logging
import shutil
import statistics
import time
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from octavo.errors import OctavoError
from octavo.files import atomic_path, cache_folder, read_json, write_json
from octavo.fingerprint import fingerprint
from octavo.quantization import quantized_layers
from octavo.runtimes.audit import AuditRow, audit_compiled, require_integers
from octavo.runtimes.calls import Call, take_apart
from octavo.runtimes.convert import to_openvino

if TYPE_CHECKING:
    import openvino

Precision = Literal["auto", "f32", "bf16"]
OnFallback = Literal["refuse", "warn"]
FORMAT = "1"
"""Raised when a change of this file or of `convert` makes cached graphs stale."""

BF16_GAIN = 1.05
"""bf16 is chosen for the float remainder only where it is at least this much faster: it adds bf16's own error."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Graph:
    """A compiled graph for one input shape, with its audit and the precision of its float remainder."""

    request: openvino.InferRequest
    precision: str
    audit: list[AuditRow]


@dataclass
class OpenVINOExecutor:
    """Evaluates `denoiser` with OpenVINO; called like the denoiser's own `forward`.

    Graphs have static shapes, which the engine runs fastest; each new shape is compiled at its first call.
    Both the converted graph and the compiled kernels are kept under `cache`, named by the network's contents.
    The executor copies what it returns, so that multistep samplers may keep it.
    """

    denoiser: nn.Module
    precision: Precision = "auto"
    threads: int | None = None
    on_fallback: OnFallback = "refuse"
    cache: Path = field(default_factory=lambda: cache_folder() / "openvino")
    graphs: dict[str, Graph] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        import openvino

        self._core = openvino.Core()
        self._forward: Callable[..., Any] = type(self.denoiser).forward.__get__(self.denoiser)
        self._output_type: type | None = None
        self._layers = [name for name, _ in quantized_layers(self.denoiser)]
        versions = (FORMAT, torch.__version__, openvino.__version__)
        self._folder = self.cache / fingerprint(self.denoiser, *versions)

    def __deepcopy__(self, memo: dict[int, Any]) -> OpenVINOExecutor:
        return self

    def __call__(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        call = take_apart(self._forward, args, kwargs)
        graph = self.graph(call)
        results = graph.request.infer([tensor.numpy() for tensor in call.tensors], share_inputs=True)
        dtype = self.denoiser.dtype if isinstance(self.denoiser.dtype, torch.dtype) else torch.float32
        outputs = tuple(torch.from_numpy(array.copy()).to(dtype) for array in results.to_tuple())
        return self._wrap(call, outputs) if return_dict else outputs

    def prepare(self, *args: Any, **kwargs: Any) -> Graph:
        """Compile and audit the graph for a call's shapes without evaluating it."""
        return self.graph(take_apart(self._forward, args, kwargs))

    def _wrap(self, call: Call, outputs: tuple[torch.Tensor, ...]) -> Any:
        if self._output_type is None:
            self._output_type = _output_type(self.denoiser)
        return self._output_type(*outputs)

    def graph(self, call: Call) -> Graph:
        """The compiled graph for the shapes of `call`, compiled and audited at first use."""
        key = _digest(call.constants, repr(call.names), repr(call.shapes))
        if key not in self.graphs:
            self.graphs[key] = self._compile(call, key)
        return self.graphs[key]

    def _compile(self, call: Call, key: str) -> Graph:
        import openvino

        model = self._converted(call)
        shapes = zip(model.inputs, call.shapes, strict=True)
        model.reshape({port: openvino.PartialShape(list(shape)) for port, shape in shapes})
        precision = self.precision if self.precision != "auto" else self._faster_precision(model, call, key)
        compiled = self._compiled(model, precision)
        rows = audit_compiled(compiled, self._layers)
        try:
            require_integers(rows)
        except OctavoError as error:
            if self.on_fallback == "refuse":
                raise
            logger.warning("%s", error)
        return Graph(compiled.create_infer_request(), precision, rows)

    def _converted(self, call: Call) -> openvino.Model:
        """The graph with a dynamic number of rows, from the cache or by conversion."""
        names = _digest(call.constants, repr(call.names), repr(call.row_dynamic_shapes()))
        folder = self._folder / names
        if folder.is_dir():
            try:
                return self._core.read_model(folder / "graph.xml")
            except RuntimeError:  # a damaged cache is not an error: what is in it can be made again
                shutil.rmtree(folder, ignore_errors=True)
        import openvino

        model = to_openvino(self.denoiser, call)
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            openvino.save_model(model, temporary / "graph.xml", compress_to_fp16=False)
        return self._core.read_model(folder / "graph.xml")

    def _compiled(self, model: openvino.Model, precision: str) -> openvino.CompiledModel:
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # only what was calibrated is quantized
            "CACHE_DIR": str(self._folder / "kernels"),
        }
        if self.threads is not None:
            settings["INFERENCE_NUM_THREADS"] = self.threads
        return self._core.compile_model(model, "CPU", settings)

    def _faster_precision(self, model: openvino.Model, call: Call, key: str) -> str:
        """bf16 if it is `BF16_GAIN` faster than f32 for these shapes, measured once and remembered beside the graph."""
        record = self._folder / f"precision-{key}-{self.threads or 'all'}.json"
        if record.is_file():
            return str(read_json(record)["precision"])
        if "BF16" not in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            return "f32"
        inputs = [tensor.numpy() for tensor in call.tensors]
        requests = {name: self._compiled(model, name).create_infer_request() for name in ("f32", "bf16")}
        times: dict[str, list[float]] = {name: [] for name in requests}
        for _ in range(7):
            for name, request in requests.items():
                start = time.perf_counter()
                request.infer(inputs, share_inputs=True)
                times[name].append(time.perf_counter() - start)
        milliseconds = {name: 1e3 * statistics.median(values[1:]) for name, values in times.items()}
        precision = "bf16" if milliseconds["f32"] > BF16_GAIN * milliseconds["bf16"] else "f32"
        write_json(record, {"precision": precision, "milliseconds": milliseconds})
        return precision


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _output_type(denoiser: nn.Module) -> type:
    """The output dataclass that the denoiser's `forward` declares (`UNet2DOutput | tuple`, ...)."""
    from diffusers.models.modeling_outputs import Transformer2DModelOutput
    from diffusers.utils import BaseOutput

    declared = typing.get_type_hints(type(denoiser).forward).get("return")
    for candidate in (declared, *typing.get_args(declared)):
        if isinstance(candidate, type) and issubclass(candidate, BaseOutput):
            return candidate
    return Transformer2DModelOutput

"""A denoiser executed by OpenVINO: one compiled graph per input shape, audited, cached on disk."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from octavo.files import cache_folder
from octavo.quantization import quantized_layers
from octavo.runtimes.audit import AuditRow, accept, audit_compiled, audited
from octavo.runtimes.calls import Call, take_apart
from octavo.runtimes.convert import refusal
from octavo.runtimes.core import import_openvino, openvino_core
from octavo.runtimes.drop_in import DropIn, answered, check_tensors
from octavo.runtimes.held import ReadsValues, with_held
from octavo.runtimes.kept_graphs import KeptGraphs, digest
from octavo.runtimes.network import float32_copy
from octavo.runtimes.pieces import kernels_in_pieces
from octavo.runtimes.precision import faster_precision, has_bf16
from octavo.runtimes.saturation import layers_to_split
from octavo.runtimes.square_attention import has_square_attention
from octavo.runtimes.streams import CONVERTING, THREADS, Streams, engine_threads, equal_parts
from octavo.runtimes.time_table import INDEX, has_tables, reads_index, with_index, without_index

if TYPE_CHECKING:
    import openvino

Precision = Literal["auto", "f32", "bf16"]
OnFallback = Literal["refuse", "warn"]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Graph:
    """A compiled graph for one input shape, with its audit and the precision of its float remainder."""

    streams: Streams
    precision: str
    audit: list[AuditRow]


@dataclass
class OpenVINOExecutor(DropIn):
    """Evaluates `denoiser` with OpenVINO; called like the denoiser's own `forward`.

    Graphs have static shapes, which the engine runs fastest; each new shape is compiled at its first call. A batch
    is cut into equal parts that run side by side (`streams.equal_parts`). What depends on the timestep alone, in float,
    is read from a table where the timesteps are whole numbers below `timesteps` (`time_table`; 0: never), and computed
    by another graph where they are not; a network that has nothing to tabulate has one graph for both.
    Both the converted graph and the compiled kernels are kept under `cache`, named by the network's contents;
    of a network with hooks or methods that are not Octavo's nothing is kept, because their code has no name.
    A network that reads a tensor's values as numbers of Python has a graph for each of these values (`held`).
    The executor copies what it returns, so that multistep samplers may keep it, in the noisy image's dtype. Threads may
    share one, and deep copies do: calls of one shape wait for each other.
    A warning is logged where the CPU has no bf16, so that f32 takes its place, and where its kernels would get sums
    of 8-bit products wrong, so that layers take two kernels.

    `denoiser` becomes a float32 copy that shares memory with the one given. Raises `OctavoError` if OpenVINO is
    missing, for NaN, infinity or numbers beyond 1e12 in a call's tensors, and for a new shape once the shared weights
    were changed.
    """

    runtime: ClassVar[str] = "openvino"

    denoiser: nn.Module
    precision: Precision = "auto"
    threads: int | None = None
    on_fallback: OnFallback = "refuse"
    timesteps: int = 1000
    cache: Path = field(default_factory=lambda: cache_folder() / "openvino")
    graphs: dict[str, Graph] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._core = openvino_core()
        if self.precision == "bf16" and not has_bf16(self._core):
            logger.warning("precision: this CPU has no bf16; what stays float runs in f32")
            self.precision = "f32"
        self.threads = self.threads or THREADS.get()
        self.denoiser = float32_copy(self.denoiser)
        self._forward: Callable[..., Any] = type(self.denoiser).forward.__get__(self.denoiser)
        self._layers = audited(self.denoiser)
        layers = dict(quantized_layers(self.denoiser))
        self._split = layers_to_split(layers.items())
        if self._split:
            logger.warning(
                "%d of %d quantized layers take two integer kernels each: this CPU adds 8-bit products in 16 bits, "
                "which overflow; quantized with --pair-limit, or with 7-bit weights, they take one",
                len(self._split),
                len(layers),
            )
        self.kept = KeptGraphs(self._core, self.denoiser, self.cache, self._split, self.timesteps)
        self._chosen: str | None = None if self.precision == "auto" else self.precision
        self._without_tables: set[str] = set()  # by a call's constants
        self._held: dict[str, frozenset[str]] = {}  # likewise -> names of tensors that a graph has to hold

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._call(args, kwargs)
        check_tensors(call)
        graph = self.graph(call)
        outputs = tuple(
            torch.from_numpy(array).to(call.dtype) for array in graph.streams.infer(self._served(call))
        )
        return answered(call, self.denoiser, outputs)

    def prepare(self, *args: Any, **kwargs: Any) -> Graph:
        """Compile and audit the graph for a call's shapes without evaluating it."""
        return self.graph(self._call(args, kwargs))

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        return with_index(take_apart(self._forward, args, kwargs), self.timesteps)

    def graph(self, call: Call) -> Graph:
        """The compiled graph for the shapes of `call`, compiled and audited at first use."""
        call = self._served(call)
        key = _key(call)
        if key not in self.graphs:
            with CONVERTING:
                if key not in self.graphs:  # another thread may have made it in the meantime
                    return self._made(call)
        return self.graphs[key]

    def _served(self, call: Call) -> Call:
        """The call as its graph takes it: without INDEX where there are no tables, with what it holds as constants."""
        while call.constants in self._held:
            call = with_held(without_index(call), self._held[call.constants])
            self.kept.fixed_rows.add(call.constants)
        if self._without_tables and call.constants in self._without_tables:
            return without_index(call)
        return call

    def _made(self, call: Call) -> Graph:
        """The graph for the call's shapes, made unless one without tables is there already."""
        try:
            model = self.kept.converted(call)
        except ReadsValues as read:
            self._held[call.constants] = read.names
            return self.graph(call)
        if self.timesteps and (
            call.constants in self.kept.fixed_rows
            or not (reads_index(model) if INDEX in call.names else has_tables(model))
        ):
            self._without_tables.add(call.constants)
            call = without_index(call)
        key = _key(call)
        if key not in self.graphs:
            self.graphs[key] = self._compile(model, call, key)
        return self.graphs[key]

    def _compile(self, model: openvino.Model, call: Call, key: str) -> Graph:
        if self._chosen is None:  # once: a short last batch must not differ from the others in precision
            self._chosen = self._faster_precision(model, call, key)
        streams = self._streams(model, call, self._chosen)
        in_pieces = kernels_in_pieces(model, self.denoiser)
        rows = audit_compiled(streams.compiled, self._layers, self._split, in_pieces)
        if not all(row.ok for row in rows):
            # on AVX-512 the engine may tokenize a chain of small linear layers into one float subgraph
            other = self._streams(model, call, self._chosen, whole_kernels=True)
            of_other = audit_compiled(other.compiled, self._layers, self._split, in_pieces)
            if sum(row.ok for row in of_other) > sum(row.ok for row in rows):
                streams, rows = other, of_other
        if len(streams.requests) > 1 and not all(row.ok for row in rows):
            # OpenVINO 2026.4 computes float FakeQuantize wrongly on several streams (docs/log.md, 2026-11-22)
            streams = self._streams(model, call, self._chosen, most_parts=1)
        accept(rows, self.on_fallback)
        return Graph(streams, self._chosen, rows)

    def _streams(
        self,
        model: openvino.Model,
        call: Call,
        precision: str,
        most_parts: int | None = None,
        whole_kernels: bool = False,
    ) -> Streams:
        """The graph for the call's shapes, its batch cut into as many equal parts as the threads allow."""
        if call.constants in self.kept.fixed_rows:
            most_parts = 1
        parts = equal_parts(call.rows, most_parts or engine_threads(self.threads))
        shapes = [list(tensor.shape) for tensor in call.part(0, parts)]
        model.reshape(
            {
                port: import_openvino().PartialShape(shape)
                for port, shape in zip(model.inputs, shapes, strict=True)
            }
        )
        whole_kernels = whole_kernels or has_square_attention(model)
        return Streams(self._compiled(model, precision, parts, whole_kernels), parts)

    def _compiled(
        self, model: openvino.Model, precision: str, streams: int, whole_kernels: bool
    ) -> openvino.CompiledModel:
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": streams,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # only what was calibrated is quantized
        }
        if whole_kernels:
            settings["SNIPPETS_MODE"] = "DISABLE"
        if self.kept.folder is not None:
            # A folder for each setting: OpenVINO 2026.4 takes the kernels of one precision for those of another
            threads = self.threads or "all"
            whole = "-whole" if whole_kernels else ""
            settings["CACHE_DIR"] = str(
                self.kept.folder / f"kernels-{precision}-{streams}-of-{threads}{whole}"
            )
        if self.threads is not None:
            settings["INFERENCE_NUM_THREADS"] = self.threads
        try:
            compiled = self._core.compile_model(model, "CPU", settings)
        except RuntimeError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise refusal(self.denoiser, f"compile its graph ({lines[-1].strip()})") from error
        if self.kept.folder is not None and not compiled.get_property("LOADED_FROM_CACHE"):
            # a loaded graph is fused otherwise, and differs in last bits: run the loaded one from the start
            del compiled  # which makes room for it
            compiled = self._core.compile_model(model, "CPU", settings)
        return compiled

    def _faster_precision(self, model: openvino.Model, call: Call, key: str) -> str:
        name = f"precision-{key}-{self.threads or 'all'}.json"
        return faster_precision(
            self._core,
            lambda precision: functools.partial(self._streams(model, call, precision).infer, call),
            None if self.kept.folder is None else self.kept.folder / name,
        )


def _key(call: Call) -> str:
    return digest(call.constants, repr(call.names), repr(call.shapes))

"""A denoiser executed by ONNX Runtime: one graph for any number of images, audited, cached on disk."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from octavo.errors import OctavoError
from octavo.files import atomic_path, cache_folder
from octavo.fingerprint import contents, versions
from octavo.runtimes.audit import AuditRow, accept, audited
from octavo.runtimes.calls import Call, take_apart
from octavo.runtimes.convert import FixedRows
from octavo.runtimes.drop_in import DropIn, answered, check_tensors
from octavo.runtimes.graph_folders import graph_folder, tell_of_others
from octavo.runtimes.network import float32_copy, has_foreign_code
from octavo.runtimes.onnx_convert import require_onnx, save_onnx, to_onnx
from octavo.runtimes.onnx_session import infer, session
from octavo.runtimes.openvino import OnFallback
from octavo.runtimes.streams import CONVERTING, THREADS, equal_parts
from octavo.runtimes.sums import is_intact, write_sums

if TYPE_CHECKING:
    import onnx
    import onnxruntime

FORMAT = "5"
"""Raised when a change of this file or of the `onnx_` files that make graphs makes cached graphs stale."""
FIXED_ROWS = "fixed-rows"
"""Stands in the cache in place of a graph for any number of rows where none can be made."""


@dataclass(frozen=True)
class ONNXGraph:
    """A session for one kind of call, with its audit; `parts`: of a batch, side by side. What stays float is in f32."""

    session: onnxruntime.InferenceSession
    audit: list[AuditRow]
    parts: int = 1
    precision: str = "f32"


@dataclass
class ONNXExecutor(DropIn):
    """Evaluates `denoiser` with ONNX Runtime; called like the denoiser's own `forward`.

    The graph is what `octavo export --format onnx --dialect onnxruntime` writes. It takes any number of images, so that
    only another kind of call (other conditions, another size of image) is converted anew; of a network that makes
    constants of the number of rows (Chroma) there is one for each number. A quantized network's batch is cut into equal
    parts, a thread for each, which is 1.3 times faster (docs/log.md, 2026-11-28); in float it is not.
    It is kept under `cache`, named by the network's contents; of a network with hooks or methods that are not Octavo's
    nothing is kept, because their code has no name.

    `denoiser` becomes a float32 copy that shares memory with the one given. Raises `OctavoError` if the extra `onnx` is
    missing, and for a new kind of call once the shared weights were changed.
    """

    runtime: ClassVar[str] = "onnx"

    denoiser: nn.Module
    threads: int | None = None
    on_fallback: OnFallback = "refuse"
    cache: Path = field(default_factory=lambda: cache_folder() / "onnx")
    graphs: dict[str, ONNXGraph] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        require_onnx()
        self.threads = self.threads or THREADS.get()
        self.denoiser = float32_copy(self.denoiser)
        self._forward: Callable[..., Any] = type(self.denoiser).forward.__get__(self.denoiser)
        self._layers = audited(self.denoiser)
        self._contents = contents(self.denoiser)
        self._fixed_rows: set[str] = set()
        named = graph_folder(self.cache, self._contents, (FORMAT, *versions("onnx", "onnxscript").values()))
        self._folder = None if has_foreign_code(self.denoiser) else named

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = take_apart(self._forward, args, kwargs)
        check_tensors(call)
        graph = self.graph(call)
        arrays = infer(graph.session, call, graph.parts)
        outputs = tuple(torch.from_numpy(array).to(call.dtype) for array in arrays)
        return answered(call, self.denoiser, outputs)

    def prepare(self, *args: Any, **kwargs: Any) -> ONNXGraph:
        """Convert, load and audit the graph for a call of this kind without evaluating it."""
        return self.graph(take_apart(self._forward, args, kwargs))

    def graph(self, call: Call) -> ONNXGraph:
        """The graph for calls like `call`, made and audited at first use."""
        parts = equal_parts(call.rows, self._all_threads()) if self._layers else 1
        if self._key(call, parts) not in self.graphs:
            with CONVERTING:
                if (
                    self._key(call, parts) not in self.graphs
                ):  # another thread may have made it in the meantime
                    made = self._made(call, parts)  # from which on it may have another key
                    self.graphs[self._key(call, parts)] = made
        return self.graphs[self._key(call, parts)]

    def _key(self, call: Call, parts: int) -> str:
        return f"{self._name(call, parts)}-in-{parts}"

    def _name(self, call: Call, parts: int) -> str:
        kind = _kind(call)
        return f"{kind}-of-{call.rows // parts}" if kind in self._fixed_rows else kind

    def _made(self, call: Call, parts: int) -> ONNXGraph:
        if contents(self.denoiser) != self._contents:
            raise OctavoError(
                "denoiser: its weights were changed after it was accelerated; accelerate it again"
            )
        if self._folder is not None:
            tell_of_others(self._folder)
        with tempfile.TemporaryDirectory() as temporary:
            folder = self._folder or Path(temporary) / "graphs"
            mark = folder / _kind(call) / FIXED_ROWS
            try:
                if mark.is_file():
                    self._fixed_rows.add(_kind(call))
                loaded = self._session(call, folder, Path(temporary), parts)
            except FixedRows:
                with atomic_path(mark.parent) as unfinished:
                    unfinished.mkdir()
                    (unfinished / FIXED_ROWS).touch()
                self._fixed_rows.add(_kind(call))
                loaded = self._session(call, folder, Path(temporary), parts)
        graph = ONNXGraph(*loaded, parts)
        accept(graph.audit, self.on_fallback)
        return graph

    def _session(
        self, call: Call, folder: Path, temporary: Path, parts: int
    ) -> tuple[onnxruntime.InferenceSession, list[AuditRow]]:
        """The graph from within `folder`, where it is made if it is absent or damaged."""
        path, threads = folder / self._name(call, parts) / "graph.onnx", self.threads
        if (
            parts > 1
        ):  # each part has a thread that waits for it, and computes; the others serve whoever needs them
            threads = self._all_threads() - parts + 1
        if path.parent.is_dir():
            with suppress(Exception):  # of ONNX Runtime's many kinds; what is in a cache can be made again
                if is_intact(path.parent):
                    return session(path, temporary, self._layers, threads)
            shutil.rmtree(path.parent, ignore_errors=True)
        with atomic_path(path.parent) as unfinished:
            save_onnx(self._converted(call, parts), unfinished / path.name)
            write_sums(unfinished)
        try:
            return session(path, temporary, self._layers, threads)
        except OctavoError:  # nor will it load the next time
            shutil.rmtree(path.parent, ignore_errors=True)
            raise

    def _converted(self, call: Call, parts: int) -> onnx.ModelProto:
        if _kind(call) not in self._fixed_rows:
            return to_onnx(self.denoiser, call, "onnxruntime")
        part = replace(call, tensors=call.part(0, parts), rows=call.rows // parts)
        return to_onnx(self.denoiser, part, "onnxruntime", False)

    def _all_threads(self) -> int:
        return self.threads or torch.get_num_threads()


def _kind(call: Call) -> str:
    """The same for all calls that one graph serves, unless it is for one number of rows."""
    texts = call.constants, repr(call.names), repr(call.row_dynamic_shapes())
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]

"""A denoiser executed by torch on an NVIDIA GPU, its quantized layers by Triton kernels on int8, audited."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from octavo.diffusion import call_arguments
from octavo.errors import OctavoError
from octavo.fingerprint import fingerprint
from octavo.runtimes.audit import AuditRow, accept, audited
from octavo.runtimes.calls import Call, take_apart, tensors_of
from octavo.runtimes.cuda.captured import Captured, Evaluate
from octavo.runtimes.cuda.device import compute_device
from octavo.runtimes.drop_in import DropIn, answered, check_numbers
from octavo.runtimes.network import float32_copy
from octavo.runtimes.openvino import OnFallback, Precision
from octavo.runtimes.precision import BF16_GAIN, measured

if TYPE_CHECKING:
    from octavo.runtimes.cuda.watch import Watched

log = logging.getLogger(__name__)
COMPILER = "inductor"
"""The backend of torch.compile."""
FARTHEST = 0.1
"""Relative L2 distance of what is compiled or captured from what is not, for the first call's tensors. Sums in another
order turn some roundings over, seen as up to 0.05 in tiny networks of random weights; wrong code is farther."""


@dataclass(frozen=True)
class Launches:
    """What the first call of one kind launched, the precision of the float remainder, and what evaluates the others."""

    audit: list[AuditRow]
    precision: str
    evaluate: Evaluate


@dataclass
class TorchCudaExecutor(DropIn):
    """Evaluates `denoiser` on `device` (`compute_device`); called like the denoiser's own `forward`.

    The device holds a copy of the network: its integers once, packed for the kernels, the rest in one precision. Calls
    may come from the CPU or the GPU; the answer lies where the noisy image does, in its dtype. The first call of each
    kind (shapes, conditions) is watched: the audit lists the kernels that it launched. What it launched is what later
    calls launch: torch.compile fuses what lies between the products, rounding of activations included (`compiled`), and
    on a GPU the whole is captured in a CUDA graph. Where one of the two fails, or answers the first call otherwise than
    the network does (`FARTHEST`), it is left out, and a warning says so. Threads may share one, one call at a time.
    bf16 leaves the float layers at the network's edges in f32 (`octavo.runtimes.cuda.network`). Attention's products
    have no kernel here.

    On the CPU, in Triton's interpreter, everything is computed as on a GPU, slowly; "auto" is then f32, and nothing is
    compiled unless `compiled` says so.

    `denoiser` becomes a float32 copy that shares memory with the one given. Raises `OctavoError` if Triton or the GPU
    is missing, for NaN or infinity in a call's tensors, and for a new kind of call once shared weights were changed.
    """

    runtime: ClassVar[str] = "torch-cuda"

    denoiser: nn.Module
    precision: Precision = "auto"
    threads: int | None = None
    on_fallback: OnFallback = "refuse"
    compiled: bool | None = None
    graphs: dict[str, Launches] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.device = compute_device(next(self.denoiser.parameters()).device)
        self.denoiser = float32_copy(self.denoiser)
        self._forward: Callable[..., Any] = type(self.denoiser).forward.__get__(self.denoiser)
        self._layers = audited(self.denoiser)
        self._fingerprint = fingerprint(self.denoiser)
        self._network: Any = None
        self._compiled: Any = None
        self._reads: str | None = None
        self._chosen = self.precision
        self._lock = threading.Lock()
        if self.compiled is None:
            self.compiled = self.device.type == "cuda"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = take_apart(self._forward, args, kwargs)
        check_numbers(call)
        with self._lock:  # a watched call must see no other's launches
            if (key := _key(call)) not in self.graphs:
                self.graphs[key] = self._watched(call)
            with self._current():
                answer = self.graphs[key].evaluate(call.tensors)
        outputs = tuple(y.to(call.tensors[0].device, call.dtype) for y in answer)
        return answered(call, self.denoiser, outputs)

    def prepare(self, *args: Any, **kwargs: Any) -> Launches:
        """Evaluate a call of a new kind, so that it is compiled and captured, and audit what it launched."""
        call = take_apart(self._forward, args, kwargs)
        with self._lock:
            if (key := _key(call)) not in self.graphs:
                self.graphs[key] = self._watched(call)
            return self.graphs[key]

    def _watched(self, call: Call) -> Launches:
        from octavo.runtimes.cuda.watch import watching

        if fingerprint(self.denoiser) != self._fingerprint:
            raise OctavoError(
                "denoiser: its weights were changed after it was accelerated; accelerate it again"
            )
        if self._network is None:
            self._make(call)
        with watching(self._network) as seen:
            answer = self._evaluate(self._network, call, call.tensors, self._chosen)
        evaluate = self._evaluation(self._network, call)
        for quicker, what in ((self._compiled_one, "torch.compile"), (self._captured_one, "a CUDA graph")):
            seen, evaluate = self._taken(quicker, what, evaluate, call, answer, seen)
        rows = seen.audit(self._layers)
        accept(rows, self.on_fallback)
        return Launches(rows, self._chosen, evaluate)

    def _taken(
        self,
        quicker: Callable[[Evaluate, Call], Evaluate | None],
        what: str,
        evaluate: Evaluate,
        call: Call,
        answer: Sequence[torch.Tensor],
        seen: Watched,
    ) -> tuple[Watched, Evaluate]:
        """What was launched, and `evaluate` made quicker; both as they were where that fails or answers otherwise."""
        with seen.again() as anew, self._current():
            try:
                if (found := quicker(evaluate, call)) is None:
                    return seen, evaluate
                distance = _distance(found(call.tensors), answer)
            except Exception as error:  # a compiler raises whatever it likes
                why = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
            else:
                if distance <= FARTHEST:
                    return anew, found
                why = f"its answer is {distance:.2g} from the network's"
        log.warning("torch-cuda: the network runs without %s: %s", what, why)
        return seen, evaluate

    def _compiled_one(self, evaluate: Evaluate, call: Call) -> Evaluate | None:
        if not self.compiled:
            return None
        if self._compiled is None:
            self._compiled = torch.compile(self._network, backend=COMPILER, dynamic=False)
        return self._evaluation(self._compiled, call)

    def _captured_one(self, evaluate: Evaluate, call: Call) -> Evaluate | None:
        if self.device.type != "cuda":
            return None
        return Captured(evaluate, [tensor.to(self.device) for tensor in call.tensors])

    def _evaluation(self, network: Any, call: Call) -> Evaluate:
        return lambda tensors: self._evaluate(network, call, tensors, self._chosen)

    def _make(self, call: Call) -> None:
        """The network on the device, its precision chosen by `call`."""
        from octavo.runtimes.cuda.network import on_device, with_remainder
        from octavo.runtimes.cuda.watch import watching

        whole = on_device(self.denoiser, self.device)
        if self._chosen == "auto" and self.device.type == "cpu":
            self._chosen = "f32"
        if self._chosen == "f32":
            self._network = whole
            return
        with watching(whole) as seen:
            self._evaluate(whole, call, call.tensors, "f32")
        self._reads, writes = seen.edges(whole)
        networks = {name: with_remainder(whole, name, self._reads, writes) for name in ("f32", "bf16")}
        if self._chosen == "auto":
            self._chosen = self._faster(networks, call)
        self._network = networks[self._chosen]

    def _faster(self, networks: dict[str, Any], call: Call) -> Precision:
        """By graphs of the two, whose time is their kernels' alone; not compiled, which takes longer than it tells."""

        def evaluation_in(precision: str) -> Callable[[], None]:
            def uncaptured(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
                return self._evaluate(networks[precision], call, tensors, precision)

            evaluate = uncaptured
            if self.device.type == "cuda":
                with contextlib.suppress(RuntimeError):
                    evaluate = Captured(uncaptured, [tensor.to(self.device) for tensor in call.tensors])

            def wait() -> None:
                for y in evaluate(call.tensors):
                    y.cpu()

            return wait

        with self._current():
            milliseconds = measured(evaluation_in)
        return "bf16" if milliseconds["f32"] > BF16_GAIN * milliseconds["bf16"] else "f32"

    def _evaluate(
        self, network: Any, call: Call, given: Sequence[torch.Tensor], precision: str
    ) -> tuple[torch.Tensor, ...]:
        """The network's outputs for a call like `call` with the tensors `given`."""
        from octavo.runtimes.cuda.network import cast

        tensors = [
            cast(name, tensor, self.device, precision) for name, tensor in zip(call.names, given, strict=True)
        ]
        if self._reads is not None:  # in f32
            tensors[0] = given[0].to(self.device)
        with torch.no_grad(), self._current():
            return tuple(tensors_of(network(**call_arguments(self.denoiser, call.kwargs(tensors)))))

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Within the block kernels are launched on `device`, and cuDNN's f32 is f32: its own default is TF32.

        Of recurrent layers too, which nothing here has: torch refuses to tell of two that differ.
        """
        cudnn: Any = torch.backends.cudnn
        before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
        cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "ieee"
        try:
            with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
                yield
        finally:
            cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before


def _key(call: Call) -> str:
    return hashlib.sha256(repr((call.constants, call.names, call.shapes)).encode()).hexdigest()[:16]


def _distance(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """||found - expected|| / ||expected|| over all outputs; infinite for NaN."""
    x, y = (torch.cat([tensor.flatten().float() for tensor in side]) for side in (found, expected))
    distance = float((x - y).norm() / y.norm().clamp_min(torch.finfo(torch.float32).tiny))
    return distance if distance == distance else float("inf")

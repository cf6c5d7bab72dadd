"""A denoiser executed by torch on an NVIDIA GPU, its quantized layers by Triton kernels on int8, audited."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import logging
import threading
import warnings
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
from octavo.runtimes.calls import TIMESTEP, Call, take_apart, tensors_of
from octavo.runtimes.cuda.captured import Captured, Evaluate, Pool
from octavo.runtimes.cuda.device import compute_device
from octavo.runtimes.drop_in import DropIn, answered, numbers_checked
from octavo.runtimes.network import float32_copy
from octavo.runtimes.openvino import OnFallback, Precision
from octavo.runtimes.precision import BF16_GAIN, measured

if TYPE_CHECKING:
    from octavo.runtimes.cuda.watch import Watched

log = logging.getLogger(__name__)
_LOCK = threading.RLock()
"""What is watched, captured and set (TF32) belongs to the process."""
COMPILER = "inductor"
"""The backend of torch.compile."""
KINDS = 256
"""Networks of one class times shapes that torch.compile is asked for in a process; its own limit is 8."""
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

    The device holds a copy of the network: its integers packed for the kernels (convolutions' a second time where the
    network given lies there too), the rest in one precision. Calls may come from the CPU or the GPU; the answer lies
    where the noisy image does, in its dtype. The first call of each kind (shapes, conditions) is watched: the audit
    lists the kernels that it launched, which are what later calls launch.

    torch.compile fuses what lies between the products, rounding of activations included (`compiled`), and on a GPU the
    whole is captured in a CUDA graph. Where one of the two fails, leaves out a layer, or answers otherwise than the
    network does (`FARTHEST`), the network runs without it, and a warning says so.

    bf16 leaves the float layers at the network's edges in f32 (`octavo.runtimes.cuda.network`). Attention's products
    have no kernel here. Threads may share one; calls of all of them are launched one after the other.

    On the CPU, in Triton's interpreter, everything is computed as on a GPU, slowly; "auto" is then f32, and nothing is
    compiled unless `compiled` says so.

    `denoiser` becomes a float32 copy that shares memory with the one given. Raises `OctavoError` if Triton or the GPU
    is missing, for NaN, infinity or numbers beyond 1e12 in a call's tensors, and for a new kind of call once shared
    weights were changed.
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
        self._pool = Pool(self.device) if self.device.type == "cuda" else None
        if self.compiled is None:
            self.compiled = self.device.type == "cuda"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = take_apart(self._forward, args, kwargs)
        check = numbers_checked(call)
        with _LOCK:  # a watched call must see no other's launches, nor a captured one any other's settings
            if (key := _key(call)) not in self.graphs:
                check()
                self.graphs[key] = self._watched(call)
            with self._current():
                answer = self.graphs[key].evaluate(call.tensors)
        check()  # a GPU has begun by now
        outputs = tuple(y.to(call.tensors[0].device, call.dtype) for y in answer)
        return answered(call, self.denoiser, outputs)

    def prepare(self, *args: Any, **kwargs: Any) -> Launches:
        """Evaluate a call of a new kind, so that it is compiled and captured, and audit what it launched."""
        call = take_apart(self._forward, args, kwargs)
        with _LOCK:
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
        plain = evaluate = self._evaluation(self._network, call)
        with watching(self._network) as seen:
            plain(call.tensors)
        if self.compiled:
            evaluate, seen = self._quicker(self._compiled_one, "torch.compile", evaluate, plain, call, seen)
        if self._pool is not None:
            evaluate, seen = self._quicker(self._captured_one, "a CUDA graph", evaluate, plain, call, seen)
        rows = seen.audit(self._layers)
        accept(rows, self.on_fallback)
        return Launches(rows, self._chosen, evaluate)

    def _quicker(
        self,
        made_by: Callable[[Evaluate, Call], Evaluate],
        what: str,
        evaluate: Evaluate,
        plain: Evaluate,
        call: Call,
        seen: Watched,
    ) -> tuple[Evaluate, Watched]:
        """`evaluate` made quicker and what that launched; both as they were where it fails or answers otherwise.

        It is asked for other numbers than it was made with: one that gives its first answer again is found out.
        """
        others = _others(call)
        try:
            with torch.inference_mode(False), torch.no_grad(), self._current(), _compiling():
                with seen.again() as anew:
                    found = made_by(evaluate, call)
                    answer = found(others)
                distance = _distance(answer, plain(others))
        except Exception as error:  # a compiler raises whatever it likes
            log.debug("torch-cuda: %s", what, exc_info=True)
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        else:
            if not (missing := [name for name in seen.kernels if name not in anew.kernels]):
                if distance <= FARTHEST:
                    return found, anew
                why = f"its answer is {distance:.2g} from the network's"
            else:
                why = f"it leaves out {missing[0]}"
        log.warning("torch-cuda: the network runs without %s: %s", what, why)
        return evaluate, seen

    def _compiled_one(self, evaluate: Evaluate, call: Call) -> Evaluate:
        if self._compiled is None:
            self._compiled = torch.compile(self._network, backend=COMPILER, dynamic=False)
        compiled = self._evaluation(self._compiled, call)
        compiled(call.tensors)
        return compiled

    def _captured_one(self, evaluate: Evaluate, call: Call) -> Evaluate:
        from octavo.runtimes.cuda import launch

        assert self._pool is not None
        return Captured(evaluate, call.tensors, self._pool, launch.watched(None))

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
        with watching(whole, call.tensors[0]) as seen:
            self._evaluate(whole, call, call.tensors, "f32")
        self._reads, writes = seen.edges(whole)
        networks = {name: with_remainder(whole, name, self._reads, writes) for name in ("f32", "bf16")}
        if self._chosen == "auto":
            self._chosen = self._faster(networks, call)
        self._network = networks[self._chosen]

    def _faster(self, networks: dict[str, Any], call: Call) -> Precision:
        """By graphs of the two, whose time is their kernels' alone; not compiled, which takes longer than it tells."""

        from octavo.runtimes.cuda import launch

        def evaluation_in(precision: str) -> Callable[[], None]:
            def uncaptured(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
                return self._evaluate(networks[precision], call, tensors, precision)

            evaluate: Evaluate = uncaptured
            if self._pool is not None:
                with contextlib.suppress(RuntimeError):
                    evaluate = Captured(uncaptured, call.tensors, Pool(self.device), launch.watched(None))

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
        with torch.inference_mode(False), torch.no_grad(), self._current():
            tensors = [_alike(tensor) for tensor in tensors]
            return tuple(tensors_of(network(**call_arguments(self.denoiser, call.kwargs(tensors)))))

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Within the block kernels are launched on `device`, and f32 is f32 and not TF32, cuDNN's own default.

        Of recurrent layers too, which nothing here has: torch refuses to tell of two that differ.
        """
        cudnn: Any = torch.backends.cudnn
        before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
        products = torch.get_float32_matmul_precision()
        cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")
        try:
            with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
                yield
        finally:
            torch.set_float32_matmul_precision(products)
            cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before


@contextmanager
def _compiling() -> Iterator[None]:
    """Within the block torch.compile raises where it would leave a network of a class that it knows well uncompiled.

    It counts all networks of a class and all shapes. Inductor's advice to let f32 be TF32 is not passed on.
    """
    config: Any = importlib.import_module("torch._dynamo.config")
    with (
        config.patch(recompile_limit=KINDS, fail_on_recompile_limit_hit=True),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
        yield


def _key(call: Call) -> str:
    dtypes = [tensor.dtype for tensor in call.tensors]
    return hashlib.sha256(repr((call.constants, call.names, call.shapes, dtypes)).encode()).hexdigest()[:16]


def _alike(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the strides of its shape and no inference tensor: for others torch.compile compiles anew."""
    strides = torch.empty(tensor.shape, device="meta").stride()
    if tensor.stride() == strides and not tensor.is_inference():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _others(call: Call) -> list[torch.Tensor]:
    """The call's tensors with another image, and another timestep where it has one."""
    others = list(call.tensors)
    others[0] = 0.5 * others[0].roll(1, -1)
    for i, name in enumerate(call.names):
        if name == TIMESTEP:
            others[i] = (others[i] / 2).floor()
    return others


def _distance(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """||found - expected|| / ||expected|| over all outputs; infinite for NaN."""
    x, y = (torch.cat([tensor.flatten().float() for tensor in side]) for side in (found, expected))
    distance = float((x - y).norm() / y.norm().clamp_min(torch.finfo(torch.float32).tiny))
    return distance if distance == distance else float("inf")

"""A denoiser executed by torch on an NVIDIA GPU, its quantized layers by Triton kernels on int8, audited."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from octavo.diffusion import call_arguments
from octavo.errors import OctavoError
from octavo.fingerprint import fingerprint
from octavo.runtimes.audit import AuditRow, accept, audited
from octavo.runtimes.calls import Call, take_apart, tensors_of
from octavo.runtimes.cuda.device import compute_device
from octavo.runtimes.drop_in import DropIn, answered, check_numbers
from octavo.runtimes.network import float32_copy
from octavo.runtimes.openvino import OnFallback, Precision
from octavo.runtimes.precision import BF16_GAIN, measured


@dataclass(frozen=True)
class Launches:
    """What the first call of one kind launched, and the precision of the float remainder."""

    audit: list[AuditRow]
    precision: str


@dataclass
class TorchCudaExecutor(DropIn):
    """Evaluates `denoiser` on `device` (`compute_device`); called like the denoiser's own `forward`.

    The device holds a copy of the network: its integers once, packed for the kernels, the rest in one precision. Calls
    may come from the CPU or the GPU; the answer lies where the noisy image does, in its dtype. The first call of each
    kind (shapes, conditions) is watched: the audit lists the kernels that it launched. Threads may share one, one call
    at a time. bf16 leaves the float layers at the network's edges in f32 (`octavo.runtimes.cuda.network`). Attention's
    products have no kernel here.

    On the CPU, in Triton's interpreter, everything is computed as on a GPU, slowly; "auto" is then f32.

    `denoiser` becomes a float32 copy that shares memory with the one given. Raises `OctavoError` if Triton or the GPU
    is missing, for NaN or infinity in a call's tensors, and for a new kind of call once shared weights were changed.
    """

    runtime: ClassVar[str] = "torch-cuda"

    denoiser: nn.Module
    precision: Precision = "auto"
    threads: int | None = None
    on_fallback: OnFallback = "refuse"
    graphs: dict[str, Launches] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.device = compute_device(next(self.denoiser.parameters()).device)
        self.denoiser = float32_copy(self.denoiser)
        self._forward: Callable[..., Any] = type(self.denoiser).forward.__get__(self.denoiser)
        self._layers = audited(self.denoiser)
        self._fingerprint = fingerprint(self.denoiser)
        self._network: Any = None
        self._reads: str | None = None
        self._chosen = self.precision
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = take_apart(self._forward, args, kwargs)
        check_numbers(call)
        with self._lock:  # a watched call must see no other's launches
            if (key := _key(call)) in self.graphs:
                answer = self._evaluate(self._network, call, self._chosen)
            else:
                self.graphs[key], answer = self._watched(call)
        outputs = tuple(y.to(call.tensors[0].device, call.dtype) for y in answer)
        return answered(call, self.denoiser, outputs)

    def prepare(self, *args: Any, **kwargs: Any) -> Launches:
        """Evaluate a call of a new kind once, so that its kernels are compiled, and audit what it launched."""
        call = take_apart(self._forward, args, kwargs)
        with self._lock:
            if (key := _key(call)) not in self.graphs:
                self.graphs[key], _ = self._watched(call)
            return self.graphs[key]

    def _watched(self, call: Call) -> tuple[Launches, tuple[torch.Tensor, ...]]:
        from octavo.runtimes.cuda.watch import watching

        if fingerprint(self.denoiser) != self._fingerprint:
            raise OctavoError(
                "denoiser: its weights were changed after it was accelerated; accelerate it again"
            )
        if self._network is None:
            self._make(call)
        with watching(self._network) as seen:
            answer = self._evaluate(self._network, call, self._chosen)
        rows = seen.audit(self._layers)
        accept(rows, self.on_fallback)
        return Launches(rows, self._chosen), answer

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
            self._evaluate(whole, call, "f32")
        self._reads, writes = seen.edges(whole)
        networks = {name: with_remainder(whole, name, self._reads, writes) for name in ("f32", "bf16")}
        if self._chosen == "auto":
            self._chosen = self._faster(networks, call)
        self._network = networks[self._chosen]

    def _faster(self, networks: dict[str, Any], call: Call) -> Precision:
        def evaluation_in(precision: str) -> Callable[[], None]:
            def evaluate() -> None:
                for y in self._evaluate(networks[precision], call, precision):
                    y.cpu()  # waits for it

            return evaluate

        milliseconds = measured(evaluation_in)
        return "bf16" if milliseconds["f32"] > BF16_GAIN * milliseconds["bf16"] else "f32"

    def _evaluate(self, network: Any, call: Call, precision: str) -> tuple[torch.Tensor, ...]:
        from octavo.runtimes.cuda.network import cast

        tensors = [
            cast(name, tensor, self.device, precision)
            for name, tensor in zip(call.names, call.tensors, strict=True)
        ]
        if self._reads is not None:  # in f32
            tensors[0] = call.tensors[0].to(self.device)
        with torch.no_grad(), self._current():
            return tuple(tensors_of(network(**call_arguments(network, call.kwargs(tensors)))))

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Within the block kernels are launched on `device`, and cuDNN's f32 is f32: its own default is TF32."""
        cudnn: Any = torch.backends.cudnn
        convolutions = cudnn.conv
        before = convolutions.fp32_precision
        convolutions.fp32_precision = "ieee"
        try:
            with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
                yield
        finally:
            convolutions.fp32_precision = before


def _key(call: Call) -> str:
    return hashlib.sha256(repr((call.constants, call.names, call.shapes)).encode()).hexdigest()[:16]

"""What every peer is given: the float network, and one call of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from octavo.runtimes.calls import Call, take_apart, tensors_of

Engine = Callable[[], Any]


@dataclass(frozen=True)
class OnThreads:
    """An engine with threads of its own, and their number; 0: what ONNX Runtime takes by default, one a core."""

    run: Engine
    threads: int

    def __call__(self) -> Any:
        return self.run()


def threads_of(engine: Engine) -> int:
    """How many CPU threads the engine computes on: its own, or torch's."""
    return engine.threads if isinstance(engine, OnThreads) else torch.get_num_threads()


@dataclass(frozen=True)
class Task:
    """One evaluation to time.

    denoiser     the full-precision network, float32, in evaluation mode.
    kwargs       the call, every argument by name.
    calibration  calls that peers may calibrate on, at least one, and not `kwargs`, by which they are judged.
    threads      CPU threads; None: all.
    """

    denoiser: nn.Module
    kwargs: dict[str, Any]
    calibration: Sequence[dict[str, Any]]
    threads: int | None = None

    @property
    def call(self) -> Call:
        return take_apart(type(self.denoiser).forward.__get__(self.denoiser), (), self.kwargs)


class OfTensors(nn.Module):
    """The network as a function of tensors alone, as exporters and compilers want it; returns its first output."""

    def __init__(self, denoiser: nn.Module, call: Call) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.call = call

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return next(tensors_of(self.denoiser(**self.call.kwargs(tensors), return_dict=False)))


def numpy_inputs(call: Call) -> list[Any]:
    """The call's tensors as numpy arrays."""
    return [tensor.contiguous().numpy() for tensor in call.tensors]

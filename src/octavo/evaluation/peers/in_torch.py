"""Peers within torch: eager, compiled and frozen, and torchao's int8 under the Inductor."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch

from octavo.evaluation.peers.task import Engine, OfTensors, Task


def eager(task: Task, dtype: torch.dtype) -> Engine:
    """The network as it is, its weights and inputs in `dtype`."""
    given = task if dtype == torch.float32 else _cast(task, dtype)
    return lambda: given.denoiser(**given.kwargs)


def autocast(task: Task) -> Engine:
    """float32 weights under bf16 autocast, channels last: what users write first."""
    network = copy.deepcopy(task.denoiser).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def run() -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return network(**task.kwargs)

    return run


def compiled(task: Task, dtype: torch.dtype) -> Engine:
    """torch.compile with frozen weights; needs a C++ compiler."""
    task = task if dtype == torch.float32 else _cast(task, dtype)
    return _inductor(OfTensors(task.denoiser, task.call), task.call.tensors, dtype)


def torchao_int8(task: Task) -> Engine:
    """torchao's PT2E quantization by the X86InductorQuantizer, static, as its documentation has it."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    call = task.call
    network = OfTensors(task.denoiser, call).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(network, call.tensors).module()
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(exported, quantizer)
        for kwargs in task.calibration:
            prepared(*Task(task.denoiser, kwargs, ()).call.tensors)
        converted = convert_pt2e(prepared)
        return _inductor(converted, call.tensors, torch.float32)


def _inductor(network: Any, tensors: tuple[torch.Tensor, ...], dtype: torch.dtype) -> Engine:
    import torch._inductor.config as inductor

    tensors = tuple(t.to(dtype) if t.is_floating_point() and t.ndim > 1 else t for t in tensors)
    before = inductor.freezing
    inductor.freezing = True
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            run = torch.compile(network)
            run(*tensors)
            run(*tensors)
    finally:
        inductor.freezing = before

    def evaluate() -> Any:
        with torch.no_grad():
            return run(*tensors)

    return evaluate


def _cast(task: Task, dtype: torch.dtype) -> Task:
    network = copy.deepcopy(task.denoiser)
    torch.nn.Module.to(network, dtype)

    def cast(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(dtype) if value.is_floating_point() and value.ndim > 1 else value
        if isinstance(value, dict):
            return {key: cast(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(cast(item) for item in value)
        return value

    return Task(network, cast(task.kwargs), task.calibration, task.threads)

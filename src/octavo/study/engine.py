"""Execute a pipeline as fast as this machine can: real int8 where it converts, else a float simulation."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from octavo.diffusion import find_denoiser, first_call, with_denoiser
from octavo.errors import OctavoError
from octavo.quantization import quantized_layers
from octavo.runtimes.accelerate import executed_by
from octavo.runtimes.openvino import OpenVINOExecutor

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

RUNTIMES = logging.getLogger("octavo.runtimes")
INT8, FLOAT_ACTIVATIONS, FLOAT = (
    "int8 (OpenVINO)",
    "float activations (OpenVINO f32)",
    "float (OpenVINO f32)",
)


def execute(
    pipeline: DiffusionPipeline, batch_size: int, cache: Path, inputs: Mapping[str, Any] | None = None
) -> tuple[DiffusionPipeline, str]:
    """The pipeline on OpenVINO with an f32 remainder, and what it then is, in a few words.

    "int8 (OpenVINO)": every layer with integer activations runs in integers, by audit. "simulation (OpenVINO f32)":
    none does; the engine computes the same rounding in float. "float activations (OpenVINO f32)": no layer is to, since
    all quantized ones have integers for weights alone. "float (OpenVINO f32)": no quantized layers.
    Where OpenVINO cannot convert the network, torch evaluates it. Compiled graphs go to `cache`, a folder that the
    caller removes once done: a study compiles hundreds, each for one use.
    """
    component, denoiser = find_denoiser(pipeline)
    layers = sum(1 for _ in quantized_layers(denoiser))
    by_torch = pipeline, "simulation (torch)" if layers else "float (torch)"
    if next(denoiser.parameters()).device.type != "cpu":
        return by_torch
    args, kwargs = first_call(pipeline, batch_size=batch_size, inputs=inputs)
    try:
        with _without_warnings():
            executor = OpenVINOExecutor(denoiser, precision="f32", on_fallback="warn", cache=cache)
            rows = executor.prepare(*args, **kwargs).audit
    except (OctavoError, RuntimeError):  # OpenVINO is missing, or cannot convert or compile this network
        return by_torch
    finally:
        _forget_traces()
    fast = with_denoiser(pipeline, component, executed_by(executor, denoiser))
    in_int8 = sum(row.ok for row in rows)
    if not rows:
        return fast, FLOAT_ACTIVATIONS if layers else FLOAT
    if not in_int8:
        return fast, "simulation (OpenVINO f32)"
    whole = in_int8 == len(rows)
    return fast, INT8 if whole else f"{in_int8} of {len(rows)} layers in int8 (OpenVINO)"


def _forget_traces() -> None:
    """Let go of the network's weights that every conversion leaves in memory: torch keeps what it has traced.

    What torch's own tests call between two traces (pytorch/pytorch issue 35600). It forgets the TorchScript classes of
    the whole process, which is why only a study, with its hundreds of conversions, does it.
    """
    from torch.jit import _recursive, _state

    torch._C._jit_clear_class_registry()
    _recursive.concrete_type_store = _recursive.ConcreteTypeStore()
    _state._clear_class_state()
    gc.collect()


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Without what each conversion warns of (fallbacks, split layers), wherever in `runtimes`: a study tables it."""
    before = RUNTIMES.level
    RUNTIMES.setLevel(logging.ERROR)
    try:
        yield
    finally:
        RUNTIMES.setLevel(before)

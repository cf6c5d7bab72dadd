"""How long a mix of float and int8 layers takes: two measured ends, and multiply-accumulates between them"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from octavo.diffusion import find_denoiser, first_call
from octavo.errors import OctavoError
from octavo.evaluation.cost import layer_costs
from octavo.evaluation.speed import Timing, take_turns
from octavo.quantization import QuantLayer
from octavo.study.engine import FLOAT as IN_FLOAT
from octavo.study.engine import FLOAT_ACTIVATIONS, INT8, execute
from octavo.study.one_at_a_time import OneAtATime

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

ALL, FLOAT = "all", "float"


@dataclass(frozen=True)
class LayerTime:
    """A linear model of one evaluation's milliseconds.

        T(F) = int8_ms + (float_ms - int8_ms) sum of macs over F / sum of macs,    F: the layers in float

    `int8_ms`, `float_ms`: medians of the network with all its layers quantized and with none, on OpenVINO with an f32
    remainder, in turn in one process. Both ends are measured; between them a layer's share is that of its
    multiply-accumulates, which is an assumption: small layers cost more than that, and conversions at the borders
    between int8 and float are not in it; and quantized upsamplings that are sub-pixel convolutions are these here in
    float too, which a layer that stays float is not. So a choice by this model is measured again (`times`).
    """

    int8_ms: float
    float_ms: float
    macs: Mapping[str, int]

    def extra(self, layer: str) -> float:
        """What it costs to leave `layer` in float, as a fraction of the all-int8 network's time."""
        return (self.float_ms / self.int8_ms - 1) * self.macs[layer] / sum(self.macs.values())


def times(
    bench: OneAtATime,
    mixes: Mapping[str, Mapping[str, nn.Module]],
    folder: Path,
    *,
    batch_size: int,
    rounds: int = 15,
) -> dict[str, Timing]:
    """One evaluation of the network with each mix of quantized layers (the rest float), on OpenVINO, in turn.

    `folder` is for compiled graphs, which are removed. Raises `OctavoError` where a layer with integer activations
    would not run in integers: its time would then say nothing.
    """
    engines = {}
    args, kwargs = first_call(bench.pipeline, batch_size=batch_size, inputs=bench.inputs)
    try:
        for name, layers in mixes.items():
            with bench.exchanged(layers):
                fast, how = execute(bench.pipeline, batch_size, folder, bench.inputs)
            if how != _wanted(layers):
                raise OctavoError(
                    f"budget: latency needs every layer with integer activations in int8 on OpenVINO, and here the "
                    f"network is: {how}; give --budget size=..."
                )
            engines[name] = _evaluation(fast, args, kwargs)
        with torch.inference_mode():
            return take_turns(engines, rounds=rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wanted(layers: Mapping[str, nn.Module]) -> str:
    """What `execute` is to tell of a network with these quantized layers."""
    floats = [isinstance(layer, QuantLayer) and layer.input_spec.is_float for layer in layers.values()]
    if not floats:
        return IN_FLOAT
    return FLOAT_ACTIVATIONS if all(floats) else INT8


def layer_time(
    bench: OneAtATime, quantized: Mapping[str, nn.Module], folder: Path, batch_size: int
) -> LayerTime:
    """Measure both ends, `quantized` (all layers) and float, and count each layer's multiply-accumulates."""
    found = times(bench, {ALL: quantized, FLOAT: {}}, folder, batch_size=batch_size)
    macs = {
        row.layer: row.macs for row in layer_costs(bench.pipeline, bench.inputs) if row.layer in quantized
    }
    return LayerTime(1e3 * found[ALL].median, 1e3 * found[FLOAT].median, macs)


def _evaluation(pipeline: DiffusionPipeline, args: Any, kwargs: Any) -> Any:
    _, denoiser = find_denoiser(pipeline)
    return lambda: denoiser(*args, **kwargs)

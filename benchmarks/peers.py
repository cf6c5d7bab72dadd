"""The others, each as a function from one denoiser call to its output: torch eager, OpenVINO, NNCF."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from octavo.evaluation.machine import machine
from octavo.runtimes.calls import take_apart
from octavo.runtimes.convert import to_openvino
from octavo.runtimes.core import openvino_core
from octavo.runtimes.precision import CHOICES, has_bf16
from octavo.runtimes.streams import Streams, engine_threads, equal_parts

if TYPE_CHECKING:
    import openvino

RESULTS = Path(__file__).resolve().parent / "results"
Engine = Callable[[], Any]


def precisions() -> tuple[str, ...]:
    """Those in which OpenVINO computes on this machine: asked for bf16 on one without, it computes in f32."""

    return CHOICES if has_bf16(openvino_core()) else CHOICES[:1]


def openvino_float(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> openvino.Model:
    """The float network as OpenVINO converts it, with the static shapes of the call."""
    import openvino

    call = take_apart(denoiser.forward, args, kwargs)
    model = to_openvino(denoiser, call)
    model.reshape(
        {
            port: openvino.PartialShape(list(shape))
            for port, shape in zip(model.inputs, call.shapes, strict=True)
        }
    )
    return model


def nncf_models(
    denoiser: nn.Module, calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
) -> dict[str, openvino.Model]:
    """NNCF's post-training int8 of the same network, calibrated on the same calls, under each of its presets."""
    import nncf

    batches = [[t.numpy() for t in take_apart(denoiser.forward, *call).tensors] for call in calls]
    models = {}
    for preset in (nncf.QuantizationPreset.PERFORMANCE, nncf.QuantizationPreset.MIXED):
        model = openvino_float(denoiser, *calls[0])
        model = nncf.quantize(
            model, nncf.Dataset(batches), preset=preset, subset_size=len(batches), fast_bias_correction=True
        )
        models[f"nncf int8 {preset.value}"] = model
    return models


class Compiled:
    """An OpenVINO model compiled for one call's shapes; also a denoiser's `forward`.

    `parts`: the batch is cut into so many equal parts, a stream each, as Octavo cuts its own: what others may gain by
    it too, they are given.
    """

    def __init__(
        self, model: openvino.Model, precision: str, forward: Callable[..., Any], parts: int = 1
    ) -> None:
        import openvino

        if parts > 1:
            model = model.clone()
            shapes = {port: list(port.partial_shape.to_shape()) for port in model.inputs}
            model.reshape(
                {
                    port: openvino.PartialShape([shape[0] // parts, *shape[1:]])
                    for port, shape in shapes.items()
                }
            )
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": parts,
        }
        self.streams = Streams(openvino_core().compile_model(model, "CPU", settings), parts)
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> UNet2DOutput:
        outputs = self.streams.infer(take_apart(self.forward, args, kwargs))
        return UNet2DOutput(torch.from_numpy(outputs[0]))


def ways_to_cut(batch_size: int) -> dict[str, int]:
    """Name suffix -> parts of a batch, for engines that are measured in both ways."""
    parts = equal_parts(batch_size, engine_threads(None))
    return {"": 1} if parts == 1 else {"": 1, f", {parts} streams": parts}


def save(name: str, figures: dict[str, Any]) -> None:
    """Keep the figures in benchmarks/results, with the command that made them."""
    RESULTS.mkdir(exist_ok=True)
    record = {"command": " ".join(["python", *sys.argv]), "machine": machine(), **figures}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"\n{RESULTS / name}.json")

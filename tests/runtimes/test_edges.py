from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DiTPipeline

import octavo
from octavo.diffusion import first_call
from octavo.quantization import quantized_layers
from octavo.runtimes import edges, executor_of, integer_graph
from octavo.runtimes.calls import take_apart
from octavo.runtimes.convert import to_openvino
from octavo.runtimes.core import openvino_core
from octavo.runtimes.precision import has_bf16


def edges_of(pipeline: Any, denoiser: torch.nn.Module, inputs: dict[str, Any] | None = None) -> list[str]:
    args, kwargs = first_call(pipeline, batch_size=2, inputs=inputs)
    model = to_openvino(denoiser, take_apart(denoiser.forward, args, kwargs))
    names = [name for name, _ in quantized_layers(denoiser)]
    return [edges.layer_of(name) for name in edges.float_edges(model, names)]


needs_bf16 = pytest.mark.skipif(not has_bf16(openvino_core()), reason="this processor has no bf16")


def precisions(pipeline: DDIMPipeline) -> dict[str, str]:
    """Layer -> the precision in which it ran, of everything that multiplies."""
    executor = executor_of(pipeline)
    assert executor is not None
    (graph,) = executor.graphs.values()
    found = {}
    for node in graph.streams.compiled.get_runtime_model().get_ordered_ops():
        facts = {
            key: value.astype(str) for key, value in node.get_rt_info().items() if hasattr(value, "astype")
        }
        if facts.get("layerType") in ("Convolution", "FullyConnected"):
            found[edges.layer_of(node.get_friendly_name())] = str(facts["runtimePrecision"])
    return found


def test_the_edges_of_a_quantized_unet(pipeline: DDIMPipeline, quantized: DDIMPipeline) -> None:
    assert edges_of(quantized, quantized.unet) == ["conv_in", "conv_out"]
    assert edges_of(pipeline, pipeline.unet) == [], "a float network is left as it is"


def test_the_edges_of_a_quantized_transformer(dit: DiTPipeline) -> None:
    inputs = {"class_labels": [1, 5]}
    int8 = octavo.quantize(
        dit, octavo.PTQ4DM(samples=2, steps=2), batch_size=2, inputs=inputs, progress=False
    )
    assert edges_of(int8, int8.transformer, inputs) == ["pos_embed.proj", "proj_out_2"]


def test_quantized_edges_are_not_marked(pipeline: DDIMPipeline) -> None:
    recipe = octavo.PTQ4DM(samples=4, steps=2, first_and_last="quantized")
    whole = octavo.quantize(pipeline, recipe, batch_size=4, progress=False)
    assert edges_of(whole, whole.unet) == []


@needs_bf16
def test_only_the_edges_run_in_f32_also_from_the_cache(
    quantized: DDIMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path))
    first, second = (octavo.accelerate(quantized, precision="bf16", batch_size=2) for _ in range(2))
    assert list((tmp_path / "openvino").rglob("*.blob")), "the second is from the cache"
    for fast in (first, second):
        found = precisions(fast)
        assert {name for name, precision in found.items() if precision == "f32"} == {"conv_in", "conv_out"}
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first.unet(x, 500).sample, second.unet(x, 500).sample)


@needs_bf16
def test_it_is_nearer_to_f32_than_bf16_throughout(
    digits: DDIMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path))
    x = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))

    def error(precision: str) -> float:
        fast = octavo.accelerate(digits, precision=precision, batch_size=4)  # type: ignore[arg-type]
        with torch.no_grad():
            exact = digits.unet(x, 500).sample
        return float((fast.unet(x, 500).sample - exact).norm() / exact.norm())

    marked = error("bf16")
    monkeypatch.setattr(integer_graph, "float_edges", lambda model, quantized: [])
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "unmarked"))
    assert marked < 0.8 * error("bf16")

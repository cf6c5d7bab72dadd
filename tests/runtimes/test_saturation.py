"""Sums of 8-bit products are exact on every CPU, also on those whose kernels add in 16 bits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from diffusers import DDIMPipeline
from torch import nn

import octavo
from octavo.quantization import QParams, QuantConv2d, QuantLayer, QuantLinear, QuantSpec, quantized_layers
from octavo.runtimes import saturation
from octavo.runtimes.audit import audit_compiled
from octavo.runtimes.calls import take_apart
from octavo.runtimes.convert import to_openvino
from octavo.runtimes.core import openvino_core
from octavo.runtimes.saturation import (
    adds_in_16_bits,
    adds_neighbours,
    halves,
    layers_to_split,
    may_saturate,
)

WEIGHTS = QuantSpec(8, granularity="per_channel", narrow=True)


def layer_of(weight: torch.Tensor, input_spec: QuantSpec | None = None) -> QuantLayer:
    """A quantized layer with these integers and scales of 1 (weights) and 1/255 or 1/127 (activations)."""
    spec = input_spec or QuantSpec(8, symmetric=False)
    out, inputs = weight.shape[:2]
    convolution = weight.ndim == 4
    layer = (
        nn.Conv2d(inputs, out, weight.shape[-1], bias=False) if convolution else nn.Linear(inputs, out, False)
    )
    ones = QParams(torch.ones(out), torch.zeros(out, dtype=torch.int32))
    unit = QParams(torch.tensor(1 / spec.qmax), torch.tensor(0, dtype=torch.int32))
    kind = QuantConv2d if convolution else QuantLinear
    return kind.from_float(layer, WEIGHTS, spec, weight.to(torch.int8), ones, unit)  # type: ignore[no-any-return]


class Denoiser(nn.Module):
    """One quantized layer, called as a denoiser is."""

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        return (self.layer(sample),)


def executed(layer: QuantLayer, x: torch.Tensor, split: bool) -> torch.Tensor:
    """What the engine makes of the layer in one kernel or in two, which run in integers."""
    denoiser, names = Denoiser(layer), ["layer"] if split else []
    model = to_openvino(denoiser, take_apart(denoiser.forward, (x,), {}), names)
    model.reshape(list(x.shape))
    compiled = openvino_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    (row,) = audit_compiled(compiled, ["layer"], names)
    assert row.ok
    return torch.from_numpy(np.array(compiled(x.numpy())[0]))


def input_at_the_end(layer: QuantLayer) -> torch.Tensor:
    shape = (2, layer.weight_int8.shape[1], 5, 5)[: layer.weight_int8.ndim]
    return torch.ones(shape)


def is_exact(layer: QuantLayer, x: torch.Tensor, split: bool) -> bool:
    with torch.no_grad():
        expected = layer(x)
    return torch.allclose(executed(layer, x, split), expected, rtol=3e-6, atol=1e-4)


SHAPES = [(8, 24, 3, 3), (8, 24, 1, 1), (8, 24)]
SPECS = [QuantSpec(8, symmetric=False), QuantSpec(8, symmetric=True)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight", [127, -127])
@pytest.mark.parametrize("spec", SPECS)
def test_the_probe_tells_what_layers_do(shape: tuple[int, ...], weight: int, spec: QuantSpec) -> None:
    """At the ends of both ranges one kernel is exact just where the probe says so; two kernels are everywhere."""
    layer = layer_of(torch.full(shape, weight), spec)
    x = input_at_the_end(layer)
    assert is_exact(layer, x, split=False) is not adds_in_16_bits()
    assert is_exact(layer, x, split=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("pair", [(64, 64), (127, 1), (-64, -64), (-127, -1), (127, -127)])
def test_pairs_called_safe_are_exact_in_one_kernel(
    shape: tuple[int, ...], spec: QuantSpec, pair: tuple[int, int]
) -> None:
    """Each channel holds one such pair, at neighbouring inputs and far apart, and zeros."""
    weight = torch.zeros(shape)
    for channel in range(shape[0]):
        first, second = channel, channel + (1 if channel % 2 else 9)
        weight[channel, first], weight[channel, second] = pair
    centre = weight.clone()
    if len(shape) == 4:  # one tap only, so that no other weights meet
        centre = torch.zeros(shape)
        centre[:, :, 0, 0] = weight[:, :, 0, 0]
    layer = layer_of(centre, spec)
    assert not may_saturate(layer, by_neighbours=False)
    assert is_exact(layer, input_at_the_end(layer), split=False)


def test_random_weights_in_two_kernels() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = layer_of(torch.randint(-127, 128, (16, 24, 3, 3), generator=generator))
    x = torch.rand(2, 24, 6, 6, generator=generator)
    assert may_saturate(layer, by_neighbours=False) and may_saturate(layer, by_neighbours=True)
    assert is_exact(layer, (x * 255).round() / 255, split=True)


@pytest.mark.parametrize(
    ("weights", "any_two", "neighbours"),
    [
        ([64, 64], False, False),
        ([65, 64], True, True),
        ([127, 1], False, False),
        ([127, 2], True, True),
        ([-64, -64], False, False),
        ([-65, -64], True, True),
        ([127, -127], False, False),
        ([100, 0, 0, 100], True, False),
        ([0, 100, 100, 0], True, False),
        ([0, 0, 100, 100], True, True),
        ([0, 100, 100], True, True),  # no multiple of 4: any two may be a pair
        ([0, 100, 100, 0, 0, 0], True, True),
        ([127], False, False),
    ],
)
def test_which_weights_can_overflow(weights: list[int], any_two: bool, neighbours: bool) -> None:
    layer = layer_of(torch.tensor([[0] * len(weights), weights]))
    assert may_saturate(layer, by_neighbours=False) is any_two
    assert may_saturate(layer, by_neighbours=True) is neighbours


def pairs_at_the_limit(*shape: int) -> torch.Tensor:
    """Neighbouring inputs add up to 128 or -128, or have opposite signs; any other two overflow mostly."""
    generator = torch.Generator().manual_seed(sum(shape))

    def drawn(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (shape[0], shape[1] // 2, 1, *shape[2:]), generator=generator)

    first = torch.where(drawn(0, 2) > 0, 1, drawn(1, 128))
    second = torch.where(drawn(0, 8) > 0, 128 - first, -127)
    pairs = torch.cat([first, second], dim=2) * (2 * drawn(0, 2) - 1)
    return torch.where(drawn(0, 2) > 0, pairs, pairs.flip(2)).reshape(shape)


@pytest.mark.parametrize(
    "shape",
    [(8, 24, 3, 3), (8, 24, 1, 1), (8, 24), (3, 4, 5, 5), (64, 96, 3, 3), (5, 300), (40, 12, 2, 2), (1, 320)],
)
@pytest.mark.parametrize("spec", SPECS)
def test_neighbours_within_the_limit_are_exact_in_one_kernel(shape: tuple[int, ...], spec: QuantSpec) -> None:
    """Measured with AVX2; where a machine's engine adds otherwise, this test tells, and layers take two kernels."""
    layer = layer_of(pairs_at_the_limit(*shape), spec)
    assert adds_neighbours()
    assert may_saturate(layer, by_neighbours=False) and not may_saturate(layer, by_neighbours=True)
    assert is_exact(layer, input_at_the_end(layer), split=False)


@pytest.mark.parametrize("engine_adds_so", [True, False])
def test_a_limit_helps_where_the_engine_adds_neighbours(
    monkeypatch: pytest.MonkeyPatch, engine_adds_so: bool
) -> None:
    layers = [("limited", layer_of(pairs_at_the_limit(4, 16))), ("free", layer_of(torch.full((4, 16), 127)))]
    monkeypatch.setattr(saturation, "adds_in_16_bits", lambda: True)
    monkeypatch.setattr(saturation, "adds_neighbours", lambda: engine_adds_so)
    assert layers_to_split(layers) == (["free"] if engine_adds_so else ["limited", "free"])


def test_7_bit_weights_never_do() -> None:
    assert not may_saturate(layer_of(torch.full((4, 16), 63)), by_neighbours=False)


def test_halves_of_every_integer() -> None:
    w = torch.arange(-128, 128).to(torch.int8)
    high, low = halves(w)
    assert torch.equal(2 * high.to(torch.int32) + low.to(torch.int32), w.to(torch.int32))
    assert high.dtype == low.dtype == torch.int8
    assert int(high.min()) == -64 and int(high.max()) == 63 and set(low.tolist()) == {-1, 0, 1}


def test_an_exact_engine_splits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [("a", layer_of(torch.full((4, 16), 127))), ("b", layer_of(torch.full((4, 16), 1)))]
    monkeypatch.setattr(saturation, "adds_in_16_bits", lambda: True)
    assert layers_to_split(layers) == ["a"]
    monkeypatch.setattr(saturation, "adds_in_16_bits", lambda: False)
    assert layers_to_split(layers) == []


def assert_computes_the_simulation(fast: DDIMPipeline, simulated: DDIMPipeline) -> None:
    """To float32 precision where no value is rounded the other way, and within single rounding flips elsewhere."""
    differences = []
    with torch.no_grad():
        for timestep in range(1, 1000, 90):
            x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(timestep))
            a, b = fast.unet(x, timestep).sample, simulated.unet(x, timestep).sample
            differences.append(float((a - b).norm() / b.norm()))
    assert min(differences) < 2e-6 and max(differences) < 0.025


def test_a_pipeline_on_a_cpu_that_adds_in_16_bits(
    unlimited: DDIMPipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two integer kernels a layer, the simulation's result, and one line that says so and what mends it."""
    monkeypatch.setattr(saturation, "adds_in_16_bits", lambda: True)
    with caplog.at_level(logging.WARNING):
        fast = octavo.accelerate(unlimited, precision="f32", batch_size=2)
    (record,) = [record for record in caplog.records if "two integer kernels" in record.message]
    assert "--pair-limit" in record.message
    rows = octavo.audit(fast)
    assert all(row.ok for row in rows) and {row.kernels for row in rows} >= {2}
    assert_computes_the_simulation(fast, unlimited)


@pytest.mark.parametrize("recipe", ["ptq4dm", "best"])
def test_a_pipeline_within_the_limit_takes_one_kernel_a_layer(
    make_pipeline: Callable[..., DDIMPipeline],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    recipe: str,
) -> None:
    """Everywhere, without a word, saved and loaded; the simulation's result, and in export no note of CPUs."""
    limited = octavo.named_recipe(recipe, samples=4, steps=2, pair_limit=True)
    made = octavo.quantize(make_pipeline(), limited, batch_size=4, progress=False)
    made.save_pretrained(tmp_path / "model")
    loaded = DDIMPipeline.from_pretrained(tmp_path / "model")
    layers = dict(quantized_layers(loaded.unet))
    assert all(layer.weight_spec.pair_limit is not layer.input_spec.is_float for layer in layers.values())
    assert any(may_saturate(layer, by_neighbours=False) for layer in layers.values()), "more than 7 bits"
    monkeypatch.setattr(saturation, "adds_in_16_bits", lambda: True)
    with caplog.at_level(logging.WARNING):
        fast = octavo.accelerate(loaded, precision="f32", batch_size=2)
    assert not [record for record in caplog.records if "kernels" in record.message]
    rows = octavo.audit(fast)
    in_pieces = {
        name for name, module in fast.unet.named_modules() if type(module).__name__ == "SubPixelUpsample2D"
    }
    assert all(row.ok for row in rows)
    assert {row.kernels for row in rows if row.layer.rpartition(".")[0] not in in_pieces} == {1}
    assert_computes_the_simulation(fast, made)
    assert not [note for note in octavo.export(loaded, tmp_path / "ir", "openvino").notes if "8-bit" in note]


def test_graphs_of_both_kinds_have_caches_of_their_own(
    unlimited: DDIMPipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A cache folder may be shared by machines with and without VNNI."""
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path))
    kinds = []
    for needed in (True, False):
        monkeypatch.setattr(saturation, "adds_in_16_bits", lambda needed=needed: needed)
        fast = octavo.accelerate(unlimited, precision="f32")
        kinds.append({row.kernels for row in octavo.audit(fast)})
    assert 2 in kinds[0] and kinds[1] == {1}
    assert len(list((tmp_path / "openvino").iterdir())) == 2


def test_a_layer_with_a_kernel_too_few_is_told() -> None:
    """An engine that merged or dropped one of the two is not taken at its word."""
    x = openvino.opset13.parameter([1, 8])
    empty = openvino_core().compile_model(openvino.Model([x], [x]), "CPU")
    (row,) = audit_compiled(empty, ["layer"], ["layer"])
    assert (row.precision, row.kernels, row.ok) == ("missing", 2, False)

"""Linear layers as convolutions of one pixel: the same sums, one integer kernel, and nothing turned around."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiTPipeline
from torch import nn

import octavo
from octavo.quantization import (
    QuantSpec,
    integer_layers,
    qparams_from_range,
    quantize_layer,
    round_nearest,
)
from octavo.runtimes import integer_graph, kept_graphs
from octavo.runtimes.audit import audit_compiled
from octavo.runtimes.calls import take_apart
from octavo.runtimes.core import openvino_core
from octavo.runtimes.integer_graph import to_integer_graph
from octavo.runtimes.openvino import OpenVINOExecutor
from octavo.runtimes.saturation import adds_in_16_bits

SHAPES = {"tokens": (3, 7, 16), "one token": (3, 1, 16), "an image": (3, 4, 5, 16)}
OTHERS = {"rows": (3, 16), "a film": (3, 2, 4, 5, 16)}


class Mixer(nn.Module):
    """Two quantized layers as a transformer has them; the second has no bias. Weights of 6 bits: exact on every CPU."""

    def __init__(self) -> None:
        super().__init__()
        weights, inputs = QuantSpec(6, True, "per_channel", narrow=True), QuantSpec(8)
        self.norm = nn.LayerNorm(16)
        for name, sizes, low, high in (("up", (16, 40), -3.0, 4.0), ("down", (40, 16), -0.2, 4.0)):
            layer = nn.Linear(*sizes, bias=name == "up")
            integers, scales = round_nearest(layer.weight, weights)
            ranges = qparams_from_range(inputs, low, high)
            setattr(self, name, quantize_layer(layer, weights, inputs, integers, scales, ranges))

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = sample + self.down(
            nn.functional.gelu(self.up(self.norm(sample)), approximate="tanh")
        )
        return y


@pytest.fixture(scope="module")
def mixer() -> Mixer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Mixer().eval()


def compiled(
    network: nn.Module, x: torch.Tensor, pointwise: bool, split: bool = False
) -> tuple[Any, list[Any]]:
    """The compiled graph, and its audit."""

    layers = [name for name, _ in integer_layers(network)]
    named = layers if split else []
    model = to_integer_graph(network, take_apart(network.forward, (x,), {}), named, pointwise=pointwise)
    model.reshape(list(x.shape))
    graph = openvino_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return graph, audit_compiled(graph, layers, named)


def kinds(graph: Any) -> list[str]:
    return [_kind(node) for node in graph.get_runtime_model().get_ops()]


def _kind(node: Any) -> str:
    return str(node.get_rt_info()["layerType"].astype(str))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_convolution_gives_the_simulation_s_sums(mixer: Mixer, shape: tuple[int, ...], split: bool) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    graph, rows = compiled(mixer, x, True, split)
    assert len(rows) == 2 and all(row.ok for row in rows), rows
    assert kinds(graph).count("Convolution") == (4 if split else 2) and "FullyConnected" not in kinds(graph)
    with torch.no_grad():
        expected = mixer(x)
    step = 0.03  # one activation rounded the other way, times a weight
    torch.testing.assert_close(torch.from_numpy(graph([x.numpy()])[0]), expected, atol=step, rtol=0)


def test_the_second_reads_what_the_first_writes(mixer: Mixer) -> None:
    """Activation and quantizer are fused into the first one; no tensor is turned around."""
    graph, _ = compiled(mixer, torch.randn(2, 64, 16), True)
    assert "Transpose" not in kinds(graph)
    reads_one = [
        _kind(node.input_value(0).get_node()) == "Convolution"
        for node in graph.get_runtime_model().get_ordered_ops()
        if _kind(node) == "Convolution"
    ]
    assert reads_one == [False, True]


@pytest.mark.parametrize("shape", OTHERS.values(), ids=OTHERS)
def test_other_shapes_stay_products(mixer: Mixer, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    graph, rows = compiled(mixer, x, True)
    assert all(row.ok for row in rows) and "Convolution" not in kinds(graph)


def test_without_it_there_is_no_convolution(mixer: Mixer) -> None:
    graph, rows = compiled(mixer, torch.randn(2, 7, 16), False)
    assert all(row.ok for row in rows) and "Convolution" not in kinds(graph)


@pytest.fixture(scope="module")
def transformer(dit: DiTPipeline) -> tuple[Any, dict[str, Any]]:
    recipe = octavo.PTQ4DM(weights=7, samples=8, steps=2, pairs_per_trajectory=2)
    quantized = octavo.quantize(dit, recipe, batch_size=4, progress=False, inputs={"class_labels": [1]})
    kwargs = {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([400, 400]),
        "class_labels": torch.tensor([1, 2]),
    }
    return quantized.transformer, kwargs


def test_a_transformer_answers_alike_in_both_forms(
    transformer: tuple[Any, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, cache: Any
) -> None:
    """And neither takes the other's graph from the cache."""
    network, kwargs = transformer
    answers, kernels = [], []
    for pointwise in (False, True):
        for module in (integer_graph, kept_graphs):
            monkeypatch.setattr(module, "convolutions_are_faster", lambda pointwise=pointwise: pointwise)
        executor = OpenVINOExecutor(network, precision="f32")
        with torch.no_grad():
            answers.append(executor(**kwargs).sample)
        (graph,) = executor.graphs.values()
        kernels.append([row.kernel for row in graph.audit])
        assert all(row.ok for row in graph.audit)
    assert kernels[0] != kernels[1]
    with torch.no_grad():
        simulated = network(**kwargs).sample
    distances = [float((answer - simulated).norm() / simulated.norm()) for answer in answers]
    assert max(distances) < 0.02, distances


def test_it_goes_by_how_the_machine_adds(mixer: Mixer) -> None:
    model = to_integer_graph(mixer, take_apart(mixer.forward, (torch.randn(2, 7, 16),), {}))
    found = "Convolution" in {node.get_type_name() for node in model.get_ops()}
    assert found == adds_in_16_bits()

"""Traces without an evaluation: the same graph, and an evaluation after all where a network asks for numbers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import openvino
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DiTPipeline
from torch import nn

import octavo
from octavo.diffusion import first_call
from octavo.runtimes import convert
from octavo.runtimes.calls import take_apart
from octavo.runtimes.integer_graph import to_integer_graph
from octavo.runtimes.unevaluated import NeedsValues, unevaluated


class Network(nn.Module):
    """A function of one image between two products, as a denoiser."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(8, 8)
        self.function = function

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        y = self.function(self.first(sample).permute(0, 2, 3, 1))
        return self.last(y)


def traced(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each trace from here on was evaluated."""
    found, real = [], convert.Traceable

    def made(*args: Any, **kwargs: Any) -> Any:
        found.append(kwargs["evaluated"])
        return real(*args, **kwargs)

    monkeypatch.setattr(convert, "Traceable", made)
    return found


def agrees(function: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether the converted network computes what it does in torch."""
    network = Network(function).eval()
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    model = convert.to_openvino(network, take_apart(network.forward, (x,), {}))
    y = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.numpy())[0]
    with torch.no_grad():
        return np.allclose(y, network(x).numpy(), atol=1e-5)


def operations(model: openvino.Model) -> list[tuple[Any, ...]]:
    def value(node: Any) -> bytes:
        return node.data.tobytes() if node.get_type_name() == "Constant" else b""

    def name(node: Any) -> str:  # but for numbers that count on, and of inputs, which are told by their ports
        named = node.get_type_name() != "Parameter"
        return re.sub(r"_\d+", "", node.get_friendly_name()) if named else ""

    return [
        (
            node.get_type_name(),
            name(node),
            str(node.get_attributes()),
            [str(port.get_partial_shape()) for port in node.outputs()],
            value(node),
        )
        for node in model.get_ordered_ops()
    ]


@pytest.mark.parametrize("name", ["quantized", "dit"])
def test_the_graph_is_the_same(name: str, request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operations, their names and shapes, and all constants, as of a trace that is evaluated."""
    pipeline: DDIMPipeline | DiTPipeline = request.getfixturevalue(name)
    inputs = {"class_labels": [1, 2]} if name == "dit" else {}
    if name == "dit":
        recipe = octavo.PTQ4DM(samples=2, steps=2, metric="minmax")
        pipeline = octavo.quantize(pipeline, recipe, batch_size=2, inputs=inputs, progress=False)
    denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    args, kwargs = first_call(pipeline, batch_size=2, inputs=inputs)
    call = take_apart(denoiser.forward, args, kwargs)
    evaluated = traced(monkeypatch)
    ours = operations(to_integer_graph(denoiser, call))
    assert evaluated == [False]

    def refuses() -> Any:
        raise NeedsValues

    monkeypatch.setattr(convert, "unevaluated", refuses)
    theirs = operations(to_integer_graph(denoiser, call))
    assert evaluated == [False, False, True] and len(ours) == len(theirs) > 100
    assert [(a[:4], b[:4]) for a, b in zip(ours, theirs, strict=True) if a != b] == []


def half(y: torch.Tensor) -> torch.Tensor:
    return y * 0.5 if y.sum() > -1e9 else y


def longest(y: torch.Tensor) -> torch.Tensor:
    return y[:, : len(y[0].mean(dim=(1, 2)).tolist())]


def scaled(y: torch.Tensor) -> torch.Tensor:
    return y * float(np.ceil(y.abs().max().numpy()))


def at_the_largest(y: torch.Tensor) -> torch.Tensor:
    return y + y.flatten()[(y > y.mean()).flatten().nonzero()[0, 0]] * 0


def into_a_part(y: torch.Tensor) -> torch.Tensor:
    whole = torch.ones(y.shape)
    whole[:, :3] = y[:, :3]
    return whole


def by_name(y: torch.Tensor) -> torch.Tensor:
    weight = torch.ones(8, 8, 4, 3) / 100
    return F.conv2d(y.permute(0, 3, 1, 2), weight, padding="same").permute(0, 2, 3, 1)


def of_one_image(y: torch.Tensor) -> torch.Tensor:
    return y + F.conv1d(torch.ones(3, 10), torch.ones(8, 3, 3)).mean(-1)


@pytest.mark.parametrize(
    "function", [half, longest, scaled, at_the_largest, into_a_part, by_name, of_one_image]
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_what_asks_for_numbers_is_evaluated(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated = traced(monkeypatch)
    assert agrees(function) and evaluated == [False, True]


def in_place(y: torch.Tensor) -> torch.Tensor:
    y = y.clone()
    y += 1
    y[:, 2:4] *= 2
    y[..., 0] = 3
    return y.masked_fill_(torch.eye(6)[:, :, None] > 0, 0.5)


def parts(y: torch.Tensor) -> torch.Tensor:
    first, second = y.chunk(2, dim=-1)
    return torch.cat([first.sigmoid(), second.contiguous().view(y.shape[0], 6, 6, 4)], dim=-1)


def attention(y: torch.Tensor) -> torch.Tensor:
    tokens = y.flatten(1, 2).reshape(y.shape[0], 36, 2, 4).transpose(1, 2)
    y = F.scaled_dot_product_attention(tokens, tokens, tokens)
    return (y @ y.transpose(-1, -2) @ y).transpose(1, 2).reshape(y.shape[0], 6, 6, 8)


def transposed(y: torch.Tensor) -> torch.Tensor:
    weight = torch.ones(8, 8, 2, 2) / 10
    y = F.conv_transpose2d(y.permute(0, 3, 1, 2), weight, stride=2, output_padding=1)
    return F.conv2d(y, torch.ones(8, 8, 3, 3), None, 2, 0, (1, 1), groups=1).permute(0, 2, 3, 1)


def along_an_axis(y: torch.Tensor) -> torch.Tensor:
    y = F.conv1d(y.flatten(1, 2).transpose(-1, -2), torch.ones(8, 2, 3) / 6, padding=1, groups=4)
    y = F.conv_transpose1d(y, torch.ones(8, 1, 3) / 3, padding=1, groups=8).unflatten(2, (6, 6))
    y = F.conv3d(y[:, :, None], torch.ones(8, 8, 1, 1, 1) / 8)[:, :, 0]
    return y.permute(0, 2, 3, 1)


def resized(y: torch.Tensor) -> torch.Tensor:
    y = F.interpolate(y.permute(0, 3, 1, 2), scale_factor=2.0, mode="nearest")
    return F.group_norm(F.avg_pool2d(F.pad(y, (0, 1, 0, 1)), 2), 4).permute(0, 2, 3, 1)


def with_a_table(y: torch.Tensor) -> torch.Tensor:
    """Of whose numbers Python's are made, which depend on no product."""
    table = torch.arange(6.0).cumsum(0)
    return y * float(table[-1]) + table[: int(table[3])].sum()


@pytest.mark.parametrize(
    "function", [in_place, parts, attention, transposed, along_an_axis, resized, with_a_table]
)
def test_what_networks_do_is_not(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated = traced(monkeypatch)
    assert agrees(function) and evaluated == [False]


def test_nothing_is_written() -> None:
    """Whatever is computed from products lies over each other, and has no values to be read."""
    x = torch.ones(2, 4, 8, 8)
    with torch.inference_mode(), unevaluated():
        first = F.conv2d(x, torch.ones(16, 4, 3, 3))
        second = F.silu(first).to(torch.bfloat16)
        large = (first.flatten(1) @ torch.ones(576, 1000)).softmax(-1)
        assert first.shape == second.shape == (2, 16, 6, 6) and second.dtype == torch.bfloat16
        assert large.shape == (2, 1000) and first.data_ptr() == second.data_ptr()
        assert torch.equal(x.sum() + x.mean(), torch.tensor(513.0))
        for read in (large.sum().item, large.tolist, lambda: bool(first.mean() > 0), lambda: large.nonzero()):
            with pytest.raises(NeedsValues):
                read()
    assert torch.equal(F.conv2d(x, torch.ones(16, 4, 3, 3)), torch.full((2, 16, 6, 6), 36.0))


def test_an_error_of_the_network_s_own_is_its_own() -> None:
    """And not taken for a need of values."""
    network = Network(lambda y: y @ torch.ones(3, 3))
    x = torch.zeros(2, 4, 6, 6)
    with pytest.raises(octavo.OctavoError, match=r"OpenVINO cannot trace it \(.*12, 8"):
        convert.to_openvino(network, take_apart(network.forward, (x,), {}))
    assert inspect.isclass(NeedsValues) and not issubclass(NeedsValues, octavo.OctavoError)

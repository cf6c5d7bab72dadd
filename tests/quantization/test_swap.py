from __future__ import annotations

import pytest
import torch
from torch import nn

from octavo.errors import OctavoError
from octavo.quantization import (
    QuantConv2d,
    QuantSpec,
    dequantized,
    empty_layer,
    quantize_layer,
    quantized_layers,
    replace,
    round_nearest,
    search_values,
    walk,
)

WEIGHTS, INPUTS = QuantSpec(8, granularity="per_channel", narrow=True), QuantSpec(8, symmetric=False)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Sequential(nn.SiLU(), nn.Conv2d(4, 4, 1)) for _ in range(2)])
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.attention = nn.MultiheadAttention(4, 1)
        self.embedding = nn.Embedding(3, 4)
        self.last = nn.Linear(4, 2)
        self.again = self.last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x.mean((2, 3)))


def test_walk_finds_exact_classes_once() -> None:
    assert [name for name, _ in walk(Model())] == ["conv_in", "blocks.0.1", "blocks.1.1", "last"]


def test_replace_and_back_to_float(generator: torch.Generator) -> None:
    model = Model().eval()
    x = torch.randn(2, 3, 5, 5, generator=generator)
    for name, layer in list(walk(model)):
        if name != "last":
            integers, weight_qparams = round_nearest(layer.weight, WEIGHTS)
            qparams = search_values(torch.linspace(-4, 4, 100), INPUTS)
            replace(model, name, quantize_layer(layer, WEIGHTS, INPUTS, integers, weight_qparams, qparams))
    assert [name for name, _ in quantized_layers(model)] == ["conv_in", "blocks.0.1", "blocks.1.1"]
    assert not model.blocks[1][1].training
    quantized = model(x)
    floats = dequantized(model).eval()
    assert not list(quantized_layers(floats)) and len(list(walk(floats))) == 4
    assert isinstance(model.conv_in, QuantConv2d)  # the copy left the model alone
    difference = (floats(x) - quantized).abs().max()
    assert 0 < difference < 0.1


@pytest.mark.parametrize("name", ["", "blocks.2.1", "conv_in.weight", "nothing"])
def test_names_that_are_not_there_are_refused(name: str) -> None:
    with pytest.raises(OctavoError):
        replace(Model(), name, nn.Identity())


def test_other_classes_cannot_be_quantized() -> None:
    with pytest.raises(TypeError, match="ConvTranspose2d cannot be quantized"):
        empty_layer(nn.ConvTranspose2d(1, 1, 1), WEIGHTS, INPUTS)

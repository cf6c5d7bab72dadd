"""Balancing alone changes nothing, for each kind of layer and for the quantized layer that does it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from octavo.quantization import QuantSpec, empty_layer
from octavo.quantization.balancing import divided_weight, multiplied_input

LAYERS: dict[str, tuple[type[nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (nn.Linear, (5, 6), (2, 3, 6)),
    "linear without rows": (nn.Linear, (5, 6), (6,)),
    "conv1d": (nn.Conv1d, (5, 6, 3), (2, 6, 9)),
    "conv2d": (nn.Conv2d, (5, 6, 3, 1), (2, 6, 4, 4)),
    "conv2d without rows": (nn.Conv2d, (5, 6, 3, 1), (6, 4, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_product_stays(kind: str, generator: torch.Generator) -> None:
    float_class, shape, input_shape = LAYERS[kind]
    layer = float_class(6, 5, *([shape[2:]] if len(shape) > 2 else []), bias=False, dtype=torch.float64)
    m = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0, 16.0])  # powers of two: exact
    x = torch.randint(-9, 10, input_shape, generator=generator)
    weight = torch.randint(-9, 10, shape, generator=generator).double()
    layer.weight.data = weight
    before = layer(x.double())
    layer.weight.data = divided_weight(weight, m).double()
    multiplied = multiplied_input(x, m, weight.ndim)
    assert multiplied.dtype == torch.float32 and multiplied.shape == x.shape
    assert torch.equal(layer(multiplied.double()), before)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_quantized_layer_does_the_same(kind: str, generator: torch.Generator) -> None:
    float_class, shape, input_shape = LAYERS[kind]
    specs = QuantSpec(8, granularity="per_channel", narrow=True), QuantSpec(8)
    layer = float_class(6, 5, *([shape[2:]] if len(shape) > 2 else []))
    new = empty_layer(layer, *specs, device="cpu", balanced=True)
    new.input_multiplier.copy_(torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0, 16.0]))
    new.weight_scale.fill_(0.25)
    new.weight_int8.random_(-127, 128, generator=generator)
    x = torch.randn(input_shape, generator=generator)
    assert torch.equal(new.balanced_input(x), multiplied_input(x, new.input_multiplier, len(shape)))
    assert torch.equal(divided_weight(new.weight, new.input_multiplier), new.weight_int8 * 0.25)

"""Quantized layers of random numbers, for whoever runs them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from octavo.quantization import QuantSpec, qparams_from_range, quantize_layer, round_nearest

WEIGHTS = QuantSpec(8, granularity="per_channel", narrow=True)
U8, S8 = QuantSpec(8, symmetric=False), QuantSpec(8)


def integer_layer(
    layer: nn.Module,
    inputs: QuantSpec = U8,
    weights: QuantSpec = WEIGHTS,
    balanced: bool = False,
    low: float = -1.5,
    high: float = 2.5,
) -> Any:
    """`layer` quantized, its weights and bias drawn anew: some inputs in [-1.5, 2.5] of a normal one saturate."""
    generator = torch.Generator().manual_seed(0)
    weight: Any = layer.weight
    with torch.no_grad():
        weight.normal_(generator=generator)
        if isinstance(layer.bias, torch.Tensor):
            layer.bias.normal_(generator=generator)
    multiplier, shown = None, weight.detach()
    if balanced:
        multiplier = 0.5 + torch.rand(weight.shape[1], generator=generator)
        shown = shown / multiplier.view(-1, *[1] * (weight.ndim - 2))
    integers, of_weights = round_nearest(shown, weights, "minmax")
    of_inputs = qparams_from_range(inputs, low, high)
    return quantize_layer(layer, weights, inputs, integers, of_weights, of_inputs, multiplier)

"""Back to float: the network that a quantized one approximates, for comparison of speed and for export."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from octavo.quantization.attention_calls import detach_attention
from octavo.quantization.layers import QuantConv1d, QuantConv2d, QuantConv3d, QuantLinear
from octavo.quantization.output_correction import OutputCorrection
from octavo.quantization.quant_layer import QuantLayer
from octavo.quantization.swap import quantized_layers
from octavo.quantization.timestep_groups import TimestepGroups

BY_TIMESTEP = (OutputCorrection, TimestepGroups)


def dequantized(model: nn.Module) -> nn.Module:
    """A copy of `model` with ordinary float32 layers that hold the dequantized weights.

    Activations are no longer rounded, nor are attention's operands, by whatever scales, and the output is no longer
    corrected for that; weights stay where they were rounded to. Other modules and hooks are copied.
    """
    # deepcopy takes what its memo holds for a layer instead of copying the layer
    replacements: dict[int, Any] = {id(layer): float_layer(layer) for _, layer in quantized_layers(model)}
    new = copy.deepcopy(model, replacements)
    detach_attention(new)
    for holder in list(new.modules()):
        if isinstance(holder, nn.ModuleDict):
            for name in [name for name, module in holder.items() if isinstance(module, BY_TIMESTEP)]:
                del holder[name]
    return new


def float_layer(layer: QuantLayer) -> nn.Module:
    """An ordinary float32 layer that holds the dequantized weight."""
    bias = layer.bias is not None
    new: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    if isinstance(layer, QuantLinear):
        new = nn.Linear(layer.in_features, layer.out_features, bias=bias, device="meta")
    else:
        assert isinstance(layer, (QuantConv1d, QuantConv2d, QuantConv3d))
        kind: Any = layer.float_class
        new = kind(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            bias=bias,
            padding_mode=layer.padding_mode,
            device="meta",
        )
    new.weight = nn.Parameter(layer.weight.detach().to(torch.float32), requires_grad=False)
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=False)
    return new

"""The network that runs on a GPU, made from a quantized one: integer layers, the rest in one precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from octavo.quantization import float_layer, quantized_layers, replace, walk
from octavo.runtimes.cuda.layers import IntegerLayer
from octavo.runtimes.network import float32_copy

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
KEPT = ("time", "ids", "rotary")
"""Parts of the names of tensors that stay float32: numbers of three digits and more, which bf16 cannot tell apart."""


def on_device(network: nn.Module, device: torch.device) -> Any:
    """A float32 copy of `network` on `device` whose layers with integer activations are `IntegerLayer`s.

    It shares what memory it can. Quantized layers whose activations stay float become float layers, with the weights
    that they hold.
    """
    other = float32_copy(network)
    for name, layer in list(quantized_layers(other)):
        of_float = layer.input_spec.is_float
        replace(other, name, float_layer(layer) if of_float else IntegerLayer(layer, name))
    return nn.Module.to(other, device).eval()  # diffusers' own `to` refuses quantized models


def with_remainder(network: nn.Module, precision: str, reads: str | None, writes: str | None) -> Any:
    """A copy of what `on_device` gives with its float remainder in `precision`, but for the layers at its edges.

    `reads`, `writes`: the names of the layers that read the image and write the output, where they are in float. They
    stay in f32 and take the image, and give the output, in f32: in bf16 these would carry an error as large as all the
    quantized layers' (`octavo.runtimes.edges`). All other layers answer in `precision`, whatever they read: networks
    give their timestep's embedding the image's dtype.
    """
    if precision == "f32":
        return network
    other, dtype = float32_copy(network), DTYPES[precision]
    for name, answer in ((reads, dtype), (writes, torch.float32)):
        if name is not None:
            replace(other, name, _InFloat32(other.get_submodule(name), answer))
    for module in other.modules():
        if isinstance(module, IntegerLayer):
            module.answer = dtype
    for _, layer in walk(other):
        layer.register_forward_pre_hook(lambda _, args: (args[0].to(dtype), *args[1:]) if args else None)
    return nn.Module.to(other, dtype)


def cast(name: str, tensor: torch.Tensor, device: torch.device, precision: str) -> torch.Tensor:
    """A tensor of a call, by its name there, as the network on `device` reads it."""
    keeps = not tensor.is_floating_point() or any(part in name.rpartition(".")[2] for part in KEPT)
    return tensor.to(device, tensor.dtype if keeps else DTYPES[precision])


class _InFloat32(nn.Module):
    """A layer that computes in float32 whatever it reads, and answers in `answer`.

    It is no submodule, so that casts do not reach it and nobody takes its dtype for the network's.
    """

    def __init__(self, layer: nn.Module, answer: torch.dtype) -> None:
        super().__init__()
        self.__dict__["layer"], self.answer = layer, answer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.__dict__["layer"](x.float())
        return y.to(self.answer)

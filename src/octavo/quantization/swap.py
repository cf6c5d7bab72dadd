"""Finding the layers that can be quantized, and putting others in their place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from octavo.errors import OctavoError
from octavo.quantization.layers import (
    QUANTIZED_CLASS,
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantLinear,
)
from octavo.quantization.quant_layer import QuantLayer
from octavo.quantization.specs import QParams, QuantSpec


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d | nn.Conv1d | nn.Conv3d | nn.Linear]]:
    """Yield `(dotted name, layer)` for every Conv1d to 3d and Linear, each once, in the model's order.

    Exact classes only, because a subclass may compute something else.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.SiLU(), nn.Sequential(nn.Conv1d(1, 1, 1)))
    >>> [name for name, _ in walk(model)]
    ['0', '2.0']
    """
    for name, module in model.named_modules():
        if type(module) in QUANTIZED_CLASS:
            yield name, module


def quantized_layers(
    model: nn.Module,
) -> Iterator[tuple[str, QuantConv2d | QuantConv1d | QuantConv3d | QuantLinear]]:
    """Yield `(dotted name, layer)` for every quantized layer, in the model's order.

    >>> list(quantized_layers(nn.Linear(2, 2)))
    []
    """
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer):
            yield name, module  # type: ignore[misc]


def integer_layers(
    model: nn.Module,
) -> Iterator[tuple[str, QuantConv2d | QuantConv1d | QuantConv3d | QuantLinear]]:
    """Those of `quantized_layers` that an integer kernel is to run: all but the ones whose activations stay float."""
    return ((name, layer) for name, layer in quantized_layers(model) if not layer.input_spec.is_float)


def layer_counts(*models: nn.Module) -> dict[str, int]:
    """How many layers of the models are quantized, and how many of these have integers for their weights alone.

    >>> layer_counts(nn.Linear(2, 2))
    {'quantized_layers': 0, 'float_activations': 0}
    """
    layers = [layer for model in models for _, layer in quantized_layers(model)]
    return {
        "quantized_layers": len(layers),
        "float_activations": sum(layer.input_spec.is_float for layer in layers),
    }


def quantize_layer(
    layer: nn.Module,
    weight_spec: QuantSpec,
    input_spec: QuantSpec,
    weight_int8: torch.Tensor,
    weight_qparams: QParams,
    input_qparams: QParams,
    input_multiplier: torch.Tensor | None = None,
) -> QuantConv2d | QuantConv1d | QuantConv3d | QuantLinear:
    """`from_float` of the quantized class that belongs to `layer`; `TypeError` when there is none."""
    kind = _quantized_class(layer)
    return kind.from_float(
        layer, weight_spec, input_spec, weight_int8, weight_qparams, input_qparams, input_multiplier
    )


def empty_layer(
    layer: nn.Module,
    weight_spec: QuantSpec,
    input_spec: QuantSpec,
    device: Any = "meta",
    balanced: bool = False,
) -> QuantConv2d | QuantConv1d | QuantConv3d | QuantLinear:
    """The quantized layer of `layer`'s shape with uninitialised tensors, to load into; `TypeError` when there is none.

    >>> empty_layer(nn.Linear(2, 3), QuantSpec(8, True, "per_channel"), QuantSpec()).weight_int8.device
    device(type='meta')
    """
    return _quantized_class(layer)(layer, weight_spec, input_spec, device, balanced)


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the dotted `name` is, in place; `new` takes over the train/eval mode.

    Raises `OctavoError` when the model has no such submodule, or `name` is "" (the model itself).

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> replace(model, "0", nn.Identity())
    >>> model[0]
    Identity()
    """
    if not name:
        raise OctavoError(f"{type(model).__name__}: the model itself cannot be replaced, only its submodules")
    parent_name, _, child = name.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
        old = parent.get_submodule(child)
    except AttributeError as error:
        raise OctavoError(f"{name}: {type(model).__name__} has no such layer") from error
    setattr(parent, child, new.train(old.training))


def _quantized_class(layer: nn.Module) -> Any:
    if type(layer) not in QUANTIZED_CLASS:
        names = ", ".join(kind.__name__ for kind in QUANTIZED_CLASS)
        raise TypeError(f"{type(layer).__name__} cannot be quantized; only {names} can")
    return QUANTIZED_CLASS[type(layer)]

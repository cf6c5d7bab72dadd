"""What a loaded network holds, held against its configuration: tensors by name, numbers that calibration can give."""

from __future__ import annotations

import torch
from torch import nn

from octavo.calibration import OUTPUT_CORRECTION
from octavo.errors import OctavoError
from octavo.quantization import (
    FakeQuantizer,
    OutputCorrection,
    TimestepGroups,
    quantized_layers,
    quantized_products,
)
from octavo.quantization.groups import most_multiplier


def check_names(model: nn.Module, stored: set[str]) -> None:
    """Raise `OctavoError` unless the checkpoint `stored` what the configuration makes of `model`."""
    expected = set(model.state_dict())
    absent, unknown = sorted(expected - stored), sorted(stored - expected)
    # first the unknown: a layer that the configuration forgot lacks its float weight too
    if unknown:
        raise OctavoError(
            f"{unknown[0][:200]}: is in the checkpoint, but quantization_config makes no place for it; save or "
            "download the model again"
        )
    if absent:
        raise OctavoError(f"{absent[0][:200]}: missing from the checkpoint; save or download it again")


def check_tensors(model: nn.Module) -> None:
    """Raise `OctavoError` if a quantized layer was not filled, or holds numbers that no calibration can give.

    Integers in groups are looked at as they are stored, before `multiply_groups`.
    """
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        told_below = key.endswith(("scale", "multiplier")) or OUTPUT_CORRECTION in key
        if tensor.is_floating_point() and not (told_below or tensor.is_meta):
            _check_finite(key, tensor)
    for name, layer in quantized_layers(model):
        _check_filled(name, layer)
        _check_scale(f"{name}.weight_scale", layer.weight_scale)
        _check_scale(f"{name}.input_scale", layer.input_scale)
        if layer.input_multiplier is not None:
            _check_scale(f"{name}.input_multiplier", layer.input_multiplier)
        if layer.timestep_factor is not None:
            _check_scale(f"{name}.timestep_factor", layer.timestep_factor)
        weights, inputs = layer.weight_spec, layer.input_spec
        _check_integers(f"{name}.weight_int8", layer.weight_int8, weights.qmin, weights.qmax)
        _check_integers(f"{name}.input_zero_point", layer.input_zero_point, inputs.qmin, inputs.qmax)
        if layer.group_multiplier is not None:
            most = most_multiplier(weights)
            _check_integers(f"{name}.group_multiplier", layer.group_multiplier, 1, most)
    for name, product in quantized_products(model):
        _check_filled(name, product)
        _check_scale(f"{name}.left_scale", product.left_scale)
        _check_scale(f"{name}.right_scale", product.right_scale)
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantizer):
            _check_filled(name, module)
            _check_scale(f"{name}.scale", module.scale)
            _check_integers(f"{name}.zero_point", module.zero_point, module.spec.qmin, module.spec.qmax)
        if isinstance(module, OutputCorrection):
            _check_filled(name, module)
            _check_correction(name, module)
        if isinstance(module, TimestepGroups):
            _check_filled(name, module)
            _check_borders(name, module.borders)


def _check_filled(name: str, module: nn.Module) -> None:
    tensors = dict(module.named_buffers(recurse=False)) | dict(module.named_parameters(recurse=False))
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise OctavoError(f"{name}.{key}: missing from the checkpoint; save or download it again")


def _check_finite(name: str, values: torch.Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise OctavoError(f"{name}: holds NaN or infinity; save or download the model again")


def _check_scale(name: str, scale: torch.Tensor) -> None:
    if not bool(torch.isfinite(scale).all() and (scale > 0).all()):
        raise OctavoError(f"{name}: a scale is not a positive number; save or download the model again")


def _check_correction(name: str, module: OutputCorrection) -> None:
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in module.buffers())
    if not finite or bool((module.timesteps.diff() <= 0).any()) or bool((module.k <= -1).any()):
        raise OctavoError(
            f"{name}: is no table of numbers by ascending timestep; save or download the model again"
        )


def _check_borders(name: str, borders: torch.Tensor) -> None:
    if not bool(torch.isfinite(borders).all()) or bool((borders.diff() <= 0).any()):
        raise OctavoError(f"{name}: borders are no ascending timesteps; save or download the model again")


def _check_integers(name: str, values: torch.Tensor, low: int, high: int) -> None:
    if int(values.min()) < low or int(values.max()) > high:
        raise OctavoError(f"{name}: out of range [{low}, {high}]; save or download the model again")

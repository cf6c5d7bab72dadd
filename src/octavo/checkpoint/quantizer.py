"""Octavo's side of diffusers' loading and saving: quantized layers in, int8 tensors read natively."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from torch import nn

from octavo.calibration import attach_operations
from octavo.checkpoint.config import OctavoConfig
from octavo.errors import OctavoError
from octavo.quantization import FakeQuantizer, empty_layer, quantized_layers, replace

SCALES = ("weight_scale", "input_scale")
FLOAT32_TENSORS = (*SCALES, "octavo_operations")
"""Parts of tensor names: these are kept in float32 whatever `torch_dtype` a model is loaded in."""


class OctavoQuantizer(DiffusersQuantizer):
    """Loads a denoiser that Octavo quantized. It never quantizes by itself: that takes `octavo.quantize`."""

    requires_calibration = True

    quantization_config: OctavoConfig

    def __init__(self, quantization_config: OctavoConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise OctavoError(
                "quantization_config: these weights are not quantized yet; calibrate them with octavo.quantize"
            )
        super().__init__(quantization_config, **kwargs)

    def _process_model_before_weight_loading(
        self, model: nn.Module, keep_in_fp32_modules: list[str] | None = None, **kwargs: Any
    ) -> None:
        for name, specs in self.quantization_config.layers.items():
            try:
                layer = model.get_submodule(name)
                replace(model, name, empty_layer(layer, specs.weights, specs.activations))
            except (AttributeError, TypeError) as error:
                raise OctavoError(
                    f"quantization_config: {type(model).__name__} has no layer {name!r} that can be quantized; the "
                    "configuration belongs to another model"
                ) from error
        attach_operations(
            model,
            {
                name: FakeQuantizer(spec, device="meta")
                for name, spec in self.quantization_config.operations.items()
            },
        )
        if keep_in_fp32_modules is not None:
            keep_in_fp32_modules.extend(FLOAT32_TENSORS)
        register: Any = model.register_to_config
        register(quantization_config=self.quantization_config)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        check_tensors(model)
        check_digest(model, self.quantization_config)

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def check_tensors(model: nn.Module) -> None:
    """Raise `OctavoError` if a quantized layer was not filled, or holds numbers that no calibration can give."""
    for name, layer in quantized_layers(model):
        tensors = dict(layer.named_buffers(recurse=False)) | dict(layer.named_parameters(recurse=False))
        absent = [key for key, tensor in tensors.items() if tensor is not None and tensor.is_meta]
        if absent:
            raise OctavoError(f"{name}.{absent[0]}: missing from the checkpoint; save or download it again")
        for key in SCALES:
            scale = tensors[key]
            if not bool(torch.isfinite(scale).all() and (scale > 0).all()):
                raise OctavoError(
                    f"{name}.{key}: a scale is not a positive number; save or download the model again"
                )
        weights, zero_point = layer.weight_spec, layer.input_zero_point
        if int(layer.weight_int8.min()) < weights.qmin or int(layer.weight_int8.max()) > weights.qmax:
            raise OctavoError(
                f"{name}.weight_int8: outside [{weights.qmin}, {weights.qmax}]; download the model again"
            )
        if not layer.input_spec.qmin <= int(zero_point) <= layer.input_spec.qmax:
            raise OctavoError(
                f"{name}.input_zero_point: {int(zero_point)} is out of range; download the model again"
            )


def digest_of(model: nn.Module) -> dict[str, str]:
    """SHA-256 of the quantized layers' tensors, and of all others, each by name, type, shape and bytes."""
    names = {name for name, _ in quantized_layers(model)}
    hashes = {"quantized": hashlib.sha256(), "remainder": hashlib.sha256()}
    for key, tensor in sorted(model.state_dict().items()):
        owner, _, leaf = key.rpartition(".")
        part = hashes["quantized" if owner in names and leaf != "bias" else "remainder"]
        part.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        part.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return {part: value.hexdigest() for part, value in hashes.items()}


def check_digest(model: nn.Module, config: OctavoConfig) -> None:
    """Raise `OctavoError` if the tensors are not those that were saved.

    The float remainder is checked only when it was loaded in the type it was saved in.
    """
    found = digest_of(model)
    parts = ["quantized", "remainder"] if _remainder_dtype(model) == torch.float32 else ["quantized"]
    for part in parts:
        if part in config.digest and config.digest[part] != found[part]:
            raise OctavoError(
                f"{type(model).__name__}: its {part} tensors are not those that Octavo saved (digest differs); "
                "save or download the model again"
            )


def _remainder_dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

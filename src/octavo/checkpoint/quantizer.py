"""Octavo's side of diffusers' loading and saving: quantized layers in, int8 tensors read natively."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from safetensors import safe_open
from torch import nn

from octavo.calibration import OUTPUT_CORRECTION, attach_operations, attach_timestep_groups
from octavo.checkpoint.config import DIGESTS, OctavoConfig
from octavo.checkpoint.headers import Stored, check_fits, read_header
from octavo.checkpoint.network_config import register
from octavo.checkpoint.seals import digest_of_network
from octavo.errors import OctavoError, quoted
from octavo.quantization import (
    FakeQuantizer,
    OutputCorrection,
    TimestepGroups,
    attach_attention,
    empty_layer,
    make_sub_pixel,
    quantized_layers,
    quantized_products,
    replace,
)
from octavo.quantization.groups import most_multiplier
from octavo.quantization.packing import unpack

FLOAT32_TENSORS = (
    "weight_scale",
    "input_scale",
    "input_multiplier",
    "timestep_factor",
    "octavo_operations",
    "left_scale",
    "right_scale",
)
"""Parts of tensor names: these are kept in float32 whatever `torch_dtype` a model is loaded in."""

PACKED = ".weight_int4"
"""How the names of tensors end that hold integers two to a byte."""


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
        self._stored: dict[str, Stored] | None = None
        self._where = ""
        self._digest: str | None = None

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Sequence[Any]) -> list[str]:
        """Diffusers' first word of the files: what is in them is looked at before anything is built."""
        files = [Path(file) for file in checkpoint_files]
        self._stored = {name: tensor for file in files for name, tensor in read_header(file).items()}
        self._where = ", ".join(map(str, files))
        self._digest = digest_of_files(checkpoint_files)
        return loaded_keys

    def _process_model_before_weight_loading(
        self, model: nn.Module, keep_in_fp32_modules: list[str] | None = None, **kwargs: Any
    ) -> None:
        for name, specs in self.quantization_config.layers.items():
            try:
                if specs.sub_pixel:
                    make_sub_pixel(model, name)
                layer = model.get_submodule(name)
                replace(
                    model, name, empty_layer(layer, specs.weights, specs.activations, balanced=specs.balanced)
                )
            except (AttributeError, TypeError) as error:
                raise OctavoError(
                    f"quantization_config: {type(model).__name__} has no layer {quoted(name)} that can be quantized; "
                    "the configuration belongs to another model"
                ) from error
        operations: dict[str, nn.Module] = {
            name: FakeQuantizer(spec, device="meta")
            for name, spec in self.quantization_config.operations.items()
        }
        if self.quantization_config.output_correction is not None:
            shape = self.quantization_config.output_correction
            operations[OUTPUT_CORRECTION] = OutputCorrection.empty(shape, device="meta")
        attach_operations(model, operations)
        groups = self.quantization_config.timestep_groups
        if groups > 1:
            attach_timestep_groups(
                model,
                TimestepGroups.empty(groups, device="meta"),
                {
                    name: torch.empty(groups, device="meta")
                    for name, specs in self.quantization_config.layers.items()
                    if specs.timestep_groups > 1
                },
            )
        try:
            attach_attention(model, self.quantization_config.attention, device="meta")
        except OctavoError as error:
            raise OctavoError(
                f"quantization_config: {error}; the configuration belongs to another model"
            ) from error
        if self._stored is not None:
            check_names(model, set(self._stored))
            check_fits(self._where, self._stored, model.state_dict())
        if keep_in_fp32_modules is not None:
            keep_in_fp32_modules.extend(FLOAT32_TENSORS)
        register(model, quantization_config=self.quantization_config)

    def check_if_quantized_param(
        self, model: nn.Module, param_value: torch.Tensor, param_name: str, *args: Any, **kwargs: Any
    ) -> bool:
        """Diffusers asks of each stored tensor whether `create_quantized_param` must place it: packed ones."""
        return param_name.endswith(PACKED)

    def check_quantized_param_shape(
        self, param_name: str, current_param: torch.Tensor, loaded_param: torch.Tensor
    ) -> bool:
        raise OctavoError(
            f"{param_name}: is {list(loaded_param.shape)}, not {list(current_param.shape)}; save or download the model "
            "again"
        )

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: torch.Tensor,
        param_name: str,
        target_device: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Unpack a stored tensor into its layer; of groups their multipliers may not be there yet."""
        layer: Any = model.get_submodule(param_name.removesuffix(PACKED))
        layer.weight_int8 = unpack(param_value, layer.weight_int8.shape).to(target_device)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        check_tensors(model)
        for _, layer in quantized_layers(model):
            layer.multiply_groups()
        if self._digest is not None:
            check_digest(type(model).__name__, self._digest, self.quantization_config)
        self._stored = None

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def quantizer_of(denoiser: nn.Module) -> OctavoQuantizer | None:
    """The quantizer that made or loaded `denoiser`; None when that was not Octavo's."""
    # not by the config: diffusers turns what is there into a dict
    quantizer = getattr(denoiser, "hf_quantizer", None)
    return quantizer if isinstance(quantizer, OctavoQuantizer) else None


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


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of all tensors, each by name, type, shape and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        _add(digest, name, tensors[name])
    return digest.hexdigest()


def digest_of_files(paths: Sequence[Any]) -> str:
    """`digest_of` what the safetensors files hold together, whatever type it will be loaded in."""
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in paths]
        place = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (not a mapping)
        for name in sorted(place):
            _add(digest, name, place[name].get_tensor(name))
    return digest.hexdigest()


def _add(digest: Any, name: str, tensor: torch.Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def refresh_digest(denoiser: nn.Module, config: OctavoConfig) -> None:
    """Write into `config`, and into the denoiser's own, the digest of what `denoiser` holds now."""
    write: Any = denoiser.to_json_string
    config.files = {}
    config.digest = {
        "tensors": digest_of(denoiser.state_dict()),
        "configuration": config.configuration_digest(),
        "network": digest_of_network(json.loads(write())),
    }
    register(denoiser, quantization_config=config)


def check_digest(who: str, tensors: str, config: OctavoConfig) -> None:
    """Raise `OctavoError` if the configuration or the stored tensors are not those that were saved."""
    found = {"tensors": tensors, "configuration": config.configuration_digest()}
    if set(config.digest) not in DIGESTS:
        raise OctavoError("quantization_config: has no whole digest; save or download the model again")
    for part in found:
        if config.digest[part] != found[part]:
            raise OctavoError(
                f"{who}: its {part} {'are' if part == 'tensors' else 'is'} not what Octavo saved (digest differs); "
                "save or download the model again"
            )

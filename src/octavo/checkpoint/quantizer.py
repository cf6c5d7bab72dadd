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
from octavo.checkpoint.contents import check_names, check_tensors
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
    replace,
)
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

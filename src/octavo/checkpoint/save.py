"""Save a quantized pipeline as an ordinary diffusers folder, whole or not at all."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from octavo.calibration import Calibrated
from octavo.checkpoint.card import model_card
from octavo.checkpoint.config import FORMAT_VERSION, OctavoConfig
from octavo.checkpoint.quantizer import OctavoQuantizer, digest_of
from octavo.diffusion import find_denoiser
from octavo.errors import OctavoError
from octavo.files import atomic_path
from octavo.quantization import quantized_layers

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MODEL_CARD = "README.md"


def prepare_to_save(calibrated: Calibrated) -> DiffusionPipeline:
    """Give a freshly quantized pipeline what diffusers' saving asks for; returns it.

    The denoiser gets its `quantization_config` and quantizer; the pipeline's `save_pretrained` becomes
    `save_pipeline`, which is diffusers' own plus a model card, and never leaves half a folder behind.
    """
    pipeline = calibrated.pipeline
    denoiser = getattr(pipeline, calibrated.component)
    config = OctavoConfig(
        format_version=FORMAT_VERSION,
        layers=[
            {"weights": rule.weights.to_dict(), "activations": rule.activations.to_dict(), "names": [name]}
            for name, rule in calibrated.rules.items()
        ],
        operations={name: spec.to_dict() for name, spec in calibrated.operations.items()},
        recipe=calibrated.recipe.to_dict(),
        calibration=calibrated.calibration,
        digest=digest_of(denoiser),
    )
    denoiser.register_to_config(quantization_config=config)
    denoiser.hf_quantizer = OctavoQuantizer(config, pre_quantized=True)
    denoiser.is_quantized = True
    denoiser.quantization_method = config.quant_method
    pipeline.save_pretrained = functools.partial(save_pipeline, pipeline)
    return pipeline


def save_pipeline(pipeline: DiffusionPipeline, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
    """Write `pipeline` to `save_directory` as diffusers does, with a model card, atomically.

    Takes diffusers' own keyword arguments. Raises `OctavoError` if the folder cannot take the model's place.
    """
    folder = Path(save_directory)
    check_target(folder)
    if kwargs.get("push_to_hub"):
        raise OctavoError("push_to_hub: save the folder first, then upload it with huggingface_hub")
    component, denoiser = find_denoiser(pipeline)
    quantizer = getattr(
        denoiser, "hf_quantizer", None
    )  # not config: diffusers turns what is there into a dict
    with atomic_path(folder) as temporary:
        type(pipeline).save_pretrained(pipeline, temporary, **kwargs)
        if isinstance(quantizer, OctavoQuantizer):
            config = quantizer.quantization_config
            card = model_card(type(pipeline).__name__, component, folder.name, config, _figures(denoiser))
            (temporary / MODEL_CARD).write_text(card, encoding="utf-8")


def check_target(folder: Path) -> None:
    """Raise `OctavoError` unless `folder` is free, empty, or holds a pipeline that may be replaced."""
    if folder.is_file():
        raise OctavoError(f"{folder}: is a file; choose another name")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "model_index.json").is_file():
        raise OctavoError(f"{folder}: holds other things than a pipeline; choose another folder")


def tensor_bytes(denoiser: nn.Module) -> int:
    """Bytes of all tensors that a checkpoint of `denoiser` stores."""
    return sum(tensor.numel() * tensor.element_size() for tensor in denoiser.state_dict().values())


def float32_bytes(denoiser: nn.Module) -> int:
    """Bytes that the same network takes in float32 before quantization: 4 for each weight and bias."""
    quantized = {name for name, _ in quantized_layers(denoiser)}
    weights = sum(layer.weight_int8.numel() for _, layer in quantized_layers(denoiser))
    rest = sum(
        tensor.numel()
        for key, tensor in denoiser.state_dict().items()
        if tensor.is_floating_point()
        and not (key.rpartition(".")[0] in quantized and not key.endswith(".bias"))
    )
    return 4 * (weights + rest)


def _figures(denoiser: nn.Module) -> dict[str, Any]:
    stored, before = tensor_bytes(denoiser), float32_bytes(denoiser)
    num_layers = sum(1 for _ in quantized_layers(denoiser))
    return {
        "quantized layers": num_layers,
        "denoiser": f"{stored / 1e6:.2f} MB, {stored / before:.3f} of float32 ({before / 1e6:.2f} MB)",
        "made with": f"octavo format {FORMAT_VERSION}, torch {torch.__version__}",
    }

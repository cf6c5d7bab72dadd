"""Save a quantized pipeline as an ordinary diffusers folder, whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from octavo.calibration import Calibrated, output_correction_of
from octavo.calibration.components import quantized_parts
from octavo.calibration.operations import ATTRIBUTE
from octavo.calibration.unwrap import adapted_components
from octavo.checkpoint.card import model_card
from octavo.checkpoint.config import FORMAT_VERSION, OctavoConfig, QuantMethod
from octavo.checkpoint.network_config import check_saveable, register
from octavo.checkpoint.quantizer import OctavoQuantizer, quantizer_of, refresh_digest
from octavo.checkpoint.seals import seals_of
from octavo.checkpoint.task import TASK, recorded_task
from octavo.checkpoint.whose import MODEL_CARD, OWN_TAG
from octavo.checkpoint.wrapping import original
from octavo.diffusion import find_denoiser
from octavo.diffusion.call_signature import needed_inputs
from octavo.diffusion.denoiser import COMPONENTS
from octavo.diffusion.task import task_of
from octavo.errors import OctavoError
from octavo.files import atomic_path, read_json
from octavo.places import check_place
from octavo.quantization import quantized_layers, quantized_products, sub_pixel_names

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

COMPONENT_FILES = (".json", ".safetensors", ".txt", ".model", ".jinja")
"""What components are made of: configurations, weights, a tokenizer's vocabulary and chat template."""


def prepare_to_save(calibrated: Calibrated) -> DiffusionPipeline:
    """Give freshly quantized networks what diffusers' saving asks for; returns their pipeline.

    That is a `quantization_config` and a quantizer; by them `save_pretrained` knows that Octavo saves it.
    """
    for one in (calibrated, *calibrated.further):
        _prepare(one)
    return calibrated.pipeline


def _prepare(calibrated: Calibrated) -> None:
    pipeline = calibrated.pipeline
    denoiser = getattr(pipeline, calibrated.component)
    correction = output_correction_of(denoiser)
    config = OctavoConfig(
        format_version=FORMAT_VERSION,
        layers=[{**rule.to_dict(), "names": [name]} for name, rule in calibrated.rules.items()],
        operations={name: spec.to_dict() for name, spec in calibrated.operations.items()},
        output_correction=None if correction is None else list(correction.mean.shape),
        timestep_groups=max(rule.timestep_groups for rule in calibrated.rules.values()),
        attention=[{**specs.to_dict(), "names": [name]} for name, specs in calibrated.attention.items()],
        recipe=calibrated.recipe.to_dict(),
        calibration={**calibrated.calibration, TASK: task_of(pipeline)},
    )
    register(denoiser, quantization_config=config)
    denoiser.hf_quantizer = OctavoQuantizer(config, pre_quantized=True)
    denoiser.is_quantized = True
    denoiser.quantization_method = config.quant_method


def prepare_denoiser(denoiser: nn.Module, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
    """What must be done before diffusers saves any model: a fresh digest if Octavo quantized it, else nothing.

    Takes `save_pretrained`'s arguments. Raises `OctavoError` for a form that Octavo does not read again.
    """
    quantizer = quantizer_of(denoiser)
    if quantizer is None:
        return
    if not safe_serialization:
        raise OctavoError("safe_serialization: quantized weights are saved as safetensors only; leave it out")
    if not any(True for _ in quantized_layers(denoiser)):
        raise OctavoError(
            f"{type(denoiser).__name__}: its layers are float again; save its state_dict() instead"
        )
    check_saveable(denoiser)
    gone = set(quantizer.quantization_config.layers) - {name for name, _ in quantized_layers(denoiser)}
    if gone:
        raise OctavoError(
            f"{min(gone)}: was quantized, and has been taken out since; quantize again with it in exclude"
        )
    refresh_digest(denoiser, quantizer.quantization_config)


def holds_octavo(pipeline: DiffusionPipeline) -> bool:
    """Whether Octavo quantized the pipeline's denoiser."""
    try:
        _, denoiser = find_denoiser(pipeline)
    except OctavoError:
        return False
    return quantizer_of(denoiser) is not None


def save_pipeline(
    pipeline: DiffusionPipeline, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> None:
    """Write `pipeline` to `save_directory` as diffusers does, with a model card, whole or not at all.

    Takes diffusers' own arguments. Raises `OctavoError` if the folder cannot take the model's place.
    """
    from diffusers import DiffusionPipeline

    folder = Path(save_directory)
    check_target(folder)
    if kwargs.get("push_to_hub"):
        raise OctavoError("push_to_hub: save the folder first, then upload it with huggingface_hub")
    component, denoiser = find_denoiser(pipeline)
    for name, _ in adapted_components(pipeline):
        raise OctavoError(
            f"pipeline: its {name} has a LoRA, of which a folder keeps the LoRA alone; take it off first"
        )
    quantizer = quantizer_of(denoiser)
    with atomic_path(folder) as temporary:
        original(DiffusionPipeline.save_pretrained)(pipeline, temporary, *args, **kwargs)
        if quantizer is not None:
            config = quantizer.quantization_config
            config.files = seals_of(temporary, component)
            register(denoiser, quantization_config=config)
            write: Any = denoiser.to_json_file
            write(temporary / component / "config.json")
            figures = _figures(denoiser)
            for name, _ in quantized_parts(pipeline):
                figures[f"{name} too"] = _further_figures(getattr(pipeline, name))
            needed = needed_inputs(pipeline)
            card = model_card(type(pipeline).__name__, component, folder.name, config, figures, needed)
            (temporary / MODEL_CARD).write_text(card, encoding="utf-8")


def check_target(folder: Path) -> None:
    """Raise `OctavoError` unless `folder` is free, empty, or a pipeline that Octavo wrote and nothing else."""
    check_place(folder)
    if folder.is_file():
        raise OctavoError(f"{folder}: is a file; choose another name")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not _octavo_wrote(folder):
        raise OctavoError(
            f"{folder}: holds other things than a pipeline that Octavo wrote; choose another folder"
        )
    foreign = _foreign(folder)
    if foreign is not None:
        raise OctavoError(f"{folder}: would be replaced, but holds {foreign} too; choose another folder")


def _octavo_wrote(folder: Path) -> bool:
    card = folder / MODEL_CARD
    if not (folder / "model_index.json").is_file() or not card.is_file():
        return False
    if OWN_TAG not in card.read_text(encoding="utf-8", errors="replace"):
        return False
    configs = [folder / component / "config.json" for component in COMPONENTS]
    return any(_quant_method(path) == QuantMethod.OCTAVO for path in configs if path.is_file())


def _quant_method(path: Path) -> Any:
    try:
        return read_json(path)["quantization_config"]["quant_method"]
    except (OctavoError, TypeError, KeyError):
        return None


def _foreign(folder: Path) -> str | None:
    """The first thing in `folder` that no saving of a pipeline put there."""
    index = read_json(folder / "model_index.json")
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            return path.name
        if path.is_file():
            if path.name not in ("model_index.json", MODEL_CARD):
                return path.name
        elif path.name.startswith("_") or path.name not in index:
            return path.name
        else:
            for inner in sorted(path.iterdir()):
                if inner.is_symlink() or not inner.is_file() or inner.suffix not in COMPONENT_FILES:
                    return f"{path.name}/{inner.name}"
    return None


def tensor_bytes(denoiser: nn.Module) -> int:
    """Bytes of all tensors that a checkpoint of `denoiser` stores."""
    return sum(tensor.numel() * tensor.element_size() for tensor in denoiser.state_dict().values())


def float32_bytes(denoiser: nn.Module) -> int:
    """Bytes that the same network takes in float32 before quantization: 4 for each weight and bias of its own.

    A sub-pixel convolution's 16 weights and 4 biases were 9 and 1.
    """
    sub_pixel = set(sub_pixel_names(denoiser))
    quantized = {name for name, _ in (*quantized_layers(denoiser), *quantized_products(denoiser))}

    def sixteenths(name: str, kind: str) -> int:
        return {"weight": 9, "bias": 4}[kind] if name in sub_pixel else 16

    weights = sum(
        layer.weight_int8.numel() * sixteenths(name, "weight") // 16
        for name, layer in quantized_layers(denoiser)
    )
    rest = sum(
        tensor.numel() * sixteenths(*key.rpartition(".")[::2]) // 16
        for key, tensor in denoiser.state_dict().items()
        if tensor.is_floating_point()
        and not key.startswith(f"{ATTRIBUTE}.")
        and not (key.rpartition(".")[0] in quantized and not key.endswith(".bias"))
    )
    return 4 * (weights + rest)


def _further_figures(component: nn.Module) -> str:
    stored, before = tensor_bytes(component), float32_bytes(component)
    layers = sum(1 for _ in quantized_layers(component))
    return f"{layers} quantized layers, {stored / 1e6:.2f} MB, {stored / before:.3f} of float32 ({before / 1e6:.2f} MB)"


def _figures(denoiser: nn.Module) -> dict[str, Any]:
    stored, before = tensor_bytes(denoiser), float32_bytes(denoiser)
    num_layers = sum(1 for _ in quantized_layers(denoiser))
    correction = output_correction_of(denoiser)
    by_timestep = [layer.timestep_factor for _, layer in quantized_layers(denoiser)]
    factors = [factor for factor in by_timestep if factor is not None]
    floats = sum(layer.input_spec.is_float for _, layer in quantized_layers(denoiser))
    steps = "" if correction is None else f"at {len(correction.timesteps)} timesteps (arXiv 2305.10657)"
    task = recorded_task(denoiser)
    return {
        **({"calibrated for": task} if task else {}),
        "quantized layers": num_layers,
        "denoiser": f"{stored / 1e6:.2f} MB, {stored / before:.3f} of float32 ({before / 1e6:.2f} MB)",
        **({"float activations": f"{floats} of these layers"} if floats else {}),
        **({"scales by timestep": f"{len(factors)} layers, {len(factors[0])} groups"} if factors else {}),
        **({"output corrected": steps} if steps else {}),
        "made with": f"octavo format {FORMAT_VERSION}, torch {torch.__version__}",
    }

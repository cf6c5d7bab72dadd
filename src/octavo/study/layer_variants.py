"""Every layer at every weight width, ready to be swapped in: a network quantized for each width, kept on disk"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from octavo.calibration import PTQ4DM, collect_pairs, observe, quantize_observed, rules_of, trace
from octavo.calibration.job import job_name
from octavo.calibration.tracing import Trace
from octavo.diffusion import find_denoiser
from octavo.errors import OctavoError
from octavo.files import atomic_path
from octavo.quantization import QuantLayer, quantized_layers, walk
from octavo.quantization.packing import BITS
from octavo.quantization.swap import empty_layer
from octavo.study.variants import digest

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Layers = dict[str, QuantLayer]


def layer_variants(
    pipeline: DiffusionPipeline,
    recipe: PTQ4DM,
    weight_bits: Sequence[int],
    folder: Path,
    *,
    seed: int = 0,
    batch_size: int = 16,
    inputs: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[int, Layers]:
    """Weight bits -> layer name -> quantized layer, for each of `weight_bits` and every layer of the recipe.

    Pairs are collected and observed once. Each width is then a whole quantized network, made as `octavo.quantize`
    makes it by `layer_recipe` (balancing and second-order rounding included), so that a layer here is the layer that a
    model of this width has.

    `folder` keeps each width in one file, named by all that decides it; what is there is read instead of made, and the
    pairs go once all widths are there. Raises `OctavoError` for a recipe that does not fit, or a damaged file.
    """
    recipe = layer_recipe(recipe)
    recipes = {bits: of_width(recipe, bits) for bits in weight_bits}
    job = job_name(pipeline, recipe, seed, batch_size, inputs)
    files = {
        bits: folder / f"w{bits}-{digest(job, one.to_dict())}.safetensors" for bits, one in recipes.items()
    }
    traced = trace(pipeline, inputs)
    if not all(path.is_file() for path in files.values()):
        _, denoiser = find_denoiser(pipeline)
        rules_of(recipe, traced)  # tells what is wrong before anything is collected
        pairs_folder = folder / f"pairs-{job}"
        pairs_folder.mkdir(parents=True, exist_ok=True)
        pairs = collect_pairs(
            pipeline, recipe, pairs_folder, seed=seed, batch_size=batch_size, inputs=inputs, progress=progress
        )
        seen = observe(denoiser, pairs, state_folder=pairs_folder, progress=progress)
        for bits, path in files.items():
            if not path.is_file():
                made = quantize_observed(pipeline, recipes[bits], seen, traced, pairs=pairs, seed=seed)
                _save(path, dict(quantized_layers(find_denoiser(made)[1])))
        shutil.rmtree(pairs_folder)
    return {bits: _load(path, pipeline, recipes[bits], traced) for bits, path in files.items()}


def layer_recipe(recipe: PTQ4DM) -> PTQ4DM:
    """The recipe as far as single layers have it, each by itself.

    Float activations are 0: which layers have them is chosen of all together. Left out as well are mu, Sigma, x_{t-1},
    attention's products and the output's correction, which are no layers; groups of timesteps, whose index a layer
    knows only from a network made with them; and absorption, which changes modules that are no layers of the recipe,
    and layers together: each layer multiplies its own input. Float activations of `time_embedding` and `bits` stay.
    """
    return replace(
        recipe,
        network_output=False,
        learned_variance=False,
        sampled_image=False,
        output_correction=False,
        attention_matmuls=False,
        absorb=False,
        timestep_groups=1,
        float_activations=0.0,
    )


def of_width(recipe: PTQ4DM, weights: int) -> PTQ4DM:
    """The recipe with so many bits for the weights of every layer; activations stay as they are."""
    return replace(
        recipe,
        weights=weights,
        bits={pattern: (weights, bits[1]) for pattern, bits in recipe.bits.items()},
        group_size=recipe.group_size if weights <= BITS else None,
    )


def stored_bytes(layer: torch.nn.Module) -> int:
    """Bytes of the layer's tensors in a checkpoint: scales, bias and packing included."""
    return sum(tensor.numel() * tensor.element_size() for tensor in layer.state_dict().values())


def _save(path: Path, layers: Layers) -> None:
    tensors = {
        f"{name}/{key}": tensor.detach().cpu().contiguous()
        for name, layer in layers.items()
        for key, tensor in layer.state_dict().items()
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)


def _load(path: Path, pipeline: DiffusionPipeline, recipe: PTQ4DM, traced: Trace) -> Layers:
    _, denoiser = find_denoiser(pipeline)
    originals = dict(walk(denoiser))
    device = next(denoiser.parameters()).device
    states: dict[str, dict[str, torch.Tensor]] = {}
    layers: Layers = {}
    try:
        for key, tensor in load_file(path).items():
            name, _, leaf = key.rpartition("/")
            states.setdefault(name, {})[leaf] = tensor
        for name, rule in rules_of(recipe, traced).items():
            balanced = "input_multiplier" in states[name]
            layer = empty_layer(originals[name], rule.weights, rule.activations, device, balanced)
            layer.load_state_dict(states[name])
            layers[name] = layer.eval()
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise OctavoError(f"{path}: not readable as quantized layers; delete it and start again") from error
    return layers

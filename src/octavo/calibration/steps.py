"""Steps of a recipe that look at the pairs again: each is done where the recipe asks for it, and tells what it did."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from octavo.calibration import bias, output_correction
from octavo.calibration.activation_errors import activation_errors
from octavo.calibration.collect import PairStore
from octavo.calibration.float_activations import keep_float
from octavo.calibration.observations import Observations, observe
from octavo.calibration.operations import OUTPUT_CORRECTION, TIMESTEP_GROUPS, attach_operations
from octavo.calibration.recipe import PTQ4DM
from octavo.calibration.rules import LayerRule, with_own_bits
from octavo.calibration.second_order import round_again, summary
from octavo.calibration.timestep_scales import TimestepScales, timestep_scales
from octavo.calibration.timestep_scales import summary as timestep_summary
from octavo.calibration.tracing import Trace
from octavo.errors import OctavoError
from octavo.quantization import AttentionSpecs, sub_pixel_layers


def sub_pixels(recipe: PTQ4DM, denoiser: nn.Module, rules: Mapping[str, LayerRule]) -> list[str]:
    """The layers with a rule that become sub-pixel convolutions, where the recipe asks for these."""
    return [name for name in sub_pixel_layers(denoiser) if name in rules] if recipe.sub_pixel else []


def grouped_scales(
    recipe: PTQ4DM,
    denoiser: nn.Module,
    pairs: PairStore,
    rules: Mapping[str, LayerRule],
    factors: Mapping[str, torch.Tensor],
    folder: Path | None = None,
    progress: bool = False,
) -> tuple[TimestepScales, dict[str, Any]]:
    """Scales by timestep, where the recipe asks for them; and what is to be remembered of them."""
    if recipe.timestep_groups < 2:
        return TimestepScales(), {}
    found = timestep_scales(
        denoiser,
        pairs,
        rules,
        recipe.timestep_groups,
        metric=recipe.metric,
        multipliers=factors,
        state=folder / "timesteps.safetensors" if folder else None,
        progress=progress,
    )
    return found, {TIMESTEP_GROUPS: timestep_summary(found, len(rules))}


def rules_with_floats(
    recipe: PTQ4DM,
    denoiser: nn.Module,
    pairs: PairStore,
    rules: Mapping[str, LayerRule],
    seen: Observations,
    factors: Mapping[str, torch.Tensor],
    folder: Path | None = None,
    progress: bool = False,
) -> tuple[Mapping[str, LayerRule], dict[str, Any]]:
    """The rules, some with float activations where the recipe asks for them; and what is to be remembered of these.

    Layers whose bits the recipe gives by name keep those.
    """
    kept = with_own_bits(recipe, rules)
    if not recipe.float_activations or all(
        rule.activations.is_float or name in kept for name, rule in rules.items()
    ):
        return rules, {}
    errors = activation_errors(
        denoiser,
        pairs,
        rules,
        seen,
        metric=recipe.metric,
        multipliers=factors,
        state=folder / "activation_errors.json" if folder else None,
        progress=progress,
    )
    new, found = keep_float(rules, recipe.float_activations, errors, kept)
    return new, {"float_activations": found}


def observe_attention(
    denoiser: nn.Module,
    pairs: PairStore,
    attention: Mapping[str, AttentionSpecs],
    seen: Observations,
    folder: Path | None = None,
    progress: bool = False,
) -> None:
    """`seen` is given attention's operands, where the recipe quantizes any. Raises if one was never computed."""
    if not attention:
        return
    if folder is not None:
        folder = (
            folder / f"attention-{hashlib.sha256(json.dumps(sorted(attention)).encode()).hexdigest()[:16]}"
        )
        folder.mkdir(exist_ok=True)
    seen.attention = observe(
        denoiser, pairs, attention=attention, state_folder=folder, progress=progress
    ).attention
    for name in attention:
        if f"{name}.query" not in seen.attention:
            raise OctavoError(f"{name}: its attention never ran during calibration; exclude it")


def round_by_recipe(
    recipe: PTQ4DM,
    quantized: nn.Module,
    original: nn.Module,
    pairs: PairStore,
    seed: int,
    folder: Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Second-order rounding, where the recipe asks for it; what is to be remembered of it."""
    if recipe.rounding == "nearest":
        return {}
    state = folder / "rounded.safetensors" if folder else None
    rows = round_again(quantized, original, pairs, seed=seed, state=state, progress=progress)
    return {recipe.rounding: summary(rows)}


def correct_biases(
    recipe: PTQ4DM,
    quantized: nn.Module,
    original: nn.Module,
    pairs: PairStore,
    traced: Trace,
    progress: bool = False,
) -> dict[str, Any]:
    """Bias correction, where the recipe asks for it, on the rounded weights; what is to be remembered of it."""
    if not recipe.bias_correction:
        return {}
    rows = bias.correct_biases(quantized, original, pairs, traced.executed, progress=progress)
    return {"bias_correction": bias.summary(rows)}


def correct_output(
    recipe: PTQ4DM,
    quantized: nn.Module,
    original: nn.Module,
    pairs: PairStore,
    folder: Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Output correction, where the recipe asks for it, last of all; what is to be remembered of it."""
    if not recipe.output_correction:
        return {}
    state = folder / "output.safetensors" if folder else None
    correction, steps = output_correction.fit_output_correction(
        quantized, original, pairs, state=state, progress=progress
    )
    attach_operations(quantized, {} if correction is None else {OUTPUT_CORRECTION: correction})
    return {OUTPUT_CORRECTION: output_correction.summary(steps)}

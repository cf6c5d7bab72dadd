"""From a network, a recipe and the pairs it reads to its quantized copy: all of a calibration after the pairs"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from octavo.calibration.balanced_network import balance
from octavo.calibration.collect import PairStore
from octavo.calibration.observations import observe
from octavo.calibration.quantized_denoiser import quantize_denoiser
from octavo.calibration.recipe import PTQ4DM
from octavo.calibration.rules import LayerRule
from octavo.calibration.steps import (
    correct_biases,
    correct_output,
    grouped_scales,
    observe_attention,
    round_by_recipe,
    rules_with_floats,
    sub_pixels,
)
from octavo.calibration.tracing import Trace
from octavo.fingerprint import model_identity
from octavo.quantization import AttentionSpecs, QuantSpec, with_sub_pixel


def quantize_network(
    network: nn.Module,
    recipe: PTQ4DM,
    rules: Mapping[str, LayerRule],
    pairs: PairStore,
    traced: Trace,
    work: Path,
    *,
    operations: Mapping[str, QuantSpec] | None = None,
    attention: Mapping[str, AttentionSpecs] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[nn.Module, dict[str, LayerRule], dict[str, Any]]:
    """The quantized copy of `network`, the rules as they were applied, and what is to be remembered, JSON-safe.

    Observe what each layer reads on `pairs`, choose scales, round weights, correct what the recipe says. Work in
    progress is kept in `work`; `network` stays as it was.
    """
    operations, attention = operations or {}, attention or {}
    seen = observe(network, pairs, state_folder=work, progress=progress)
    original, changed = network, sub_pixels(recipe, network, rules)
    if changed:  # what these layers read are the same values, each once instead of four times
        network = with_sub_pixel(network, changed)
    work_of_recipe = work / _recipe_name(recipe)
    work_of_recipe.mkdir(exist_ok=True)
    balanced = balance(recipe, network, pairs, dict(rules), seen, seed, work_of_recipe, progress)
    rules, kept_float = rules_with_floats(
        recipe, balanced.network, pairs, rules, seen, balanced.multipliers, work_of_recipe, progress
    )
    multipliers = {
        name: m for name, m in balanced.multipliers.items() if not rules[name].activations.is_float
    }
    by_timestep, grouped = grouped_scales(
        recipe, balanced.network, pairs, rules, multipliers, work_of_recipe, progress
    )
    applied = {
        name: replace(
            rule,
            balanced=name in multipliers,
            timestep_groups=by_timestep.groups_of(name),
            sub_pixel=name in changed,
        )
        for name, rule in rules.items()
    }
    observe_attention(original, pairs, attention, seen, work, progress)
    quantized = quantize_denoiser(
        balanced.network,
        recipe,
        applied,
        operations,
        seen,
        multipliers=multipliers,
        attention=attention,
        by_timestep=by_timestep,
        progress=progress,
    )
    rounded = round_by_recipe(recipe, quantized, balanced.network, pairs, seed, work_of_recipe, progress)
    corrected = correct_biases(recipe, quantized, balanced.network, pairs, traced, progress)
    corrected |= correct_output(recipe, quantized, network, pairs, work_of_recipe, progress)
    facts = {**balanced.summary(), **kept_float, **grouped, **rounded, **corrected}
    if changed or balanced.absorbed:  # weights that `model_identity` would read are others
        facts["model_identity"] = model_identity(original)
    return quantized, applied, facts


def _recipe_name(recipe: PTQ4DM) -> str:
    """The job's folder is named by how the pairs are made; what is made of them, the whole recipe decides."""
    return hashlib.sha256(json.dumps(recipe.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

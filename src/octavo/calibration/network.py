"""From a network, a recipe and the pairs it reads to its quantized copy: all of a calibration after the pairs"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from octavo.calibration.balanced_network import Balanced, balance
from octavo.calibration.collect import PairStore
from octavo.calibration.observations import Observations, observe
from octavo.calibration.quantized_denoiser import RoundedWeight, quantize_denoiser
from octavo.calibration.recipe import PTQ4DM, bits_in_order
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
from octavo.calibration.timestep_scales import TimestepScales
from octavo.calibration.tracing import Trace
from octavo.fingerprint import model_identity
from octavo.memory import give_back
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
    return quantize_seen(
        network,
        recipe,
        rules,
        observe(network, pairs, state_folder=work, progress=progress),
        traced,
        pairs=pairs,
        operations=operations,
        attention=attention,
        seed=seed,
        work=work,
        progress=progress,
    )


def quantize_seen(
    network: nn.Module,
    recipe: PTQ4DM,
    rules: Mapping[str, LayerRule],
    seen: Observations,
    traced: Trace,
    *,
    pairs: PairStore | None,
    operations: Mapping[str, QuantSpec] | None = None,
    attention: Mapping[str, AttentionSpecs] | None = None,
    weights: Mapping[str, RoundedWeight] | None = None,
    seed: int = 0,
    work: Path | None = None,
    progress: bool = False,
) -> tuple[nn.Module, dict[str, LayerRule], dict[str, Any]]:
    """`quantize_network` with what was observed, which is left as it was.

    `pairs`: None leaves out the steps that look at them again, which the recipe must then not have. `weights`: what
    `round_weights` gave for this recipe; those of layers that a step changes are rounded here.
    """
    attention, seen = attention or {}, Observations(dict(seen.layers), seen.operations, dict(seen.attention))
    original, changed = network, sub_pixels(recipe, network, rules)
    if changed:  # what these layers read are the same values, each once instead of four times
        network = with_sub_pixel(network, changed)
    folder = None
    if work is not None:
        folder = work / _recipe_name(recipe)
        folder.mkdir(exist_ok=True)
    balanced, by_timestep, facts = Balanced(network), TimestepScales(), dict[str, Any]()
    if pairs is not None:
        give_back()
        balanced = balance(recipe, network, pairs, dict(rules), seen, seed, folder, progress)
        give_back()
        rules, facts = rules_with_floats(
            recipe, balanced.network, pairs, rules, seen, balanced.multipliers, folder, progress
        )
    multipliers = {
        name: m for name, m in balanced.multipliers.items() if not rules[name].activations.is_float
    }
    if pairs is not None:
        by_timestep, grouped = grouped_scales(
            recipe, balanced.network, pairs, rules, multipliers, folder, progress
        )
        facts |= grouped
        observe_attention(original, pairs, attention, seen, work, progress)
    applied = {
        name: replace(
            rule,
            balanced=name in multipliers,
            timestep_groups=by_timestep.groups_of(name),
            sub_pixel=name in changed,
        )
        for name, rule in rules.items()
    }
    others = {*balanced.changed(), *changed}
    give_back()
    quantized = quantize_denoiser(
        balanced.network,
        recipe,
        applied,
        operations or {},
        seen,
        weights={
            name: weight
            for name, weight in (weights or {}).items()
            if name not in others and not (recipe.pair_limit and applied[name].activations.is_float)
        },
        multipliers=multipliers,
        attention=attention,
        by_timestep=by_timestep,
        progress=progress,
    )
    give_back()
    if pairs is not None:
        facts |= round_by_recipe(recipe, quantized, balanced.network, pairs, seed, folder, progress)
        facts |= correct_biases(recipe, quantized, balanced.network, pairs, traced, progress)
        facts |= correct_output(recipe, quantized, original, pairs, folder, progress)
    if others:  # weights that `model_identity` would read are other ones
        facts["model_identity"] = model_identity(original)
    return quantized, applied, {**balanced.summary(), **facts}


def _recipe_name(recipe: PTQ4DM) -> str:
    """The job's folder is named by how the pairs are made; what is made of them, the whole recipe decides."""
    described = json.dumps(bits_in_order(recipe.to_dict()), sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:16]

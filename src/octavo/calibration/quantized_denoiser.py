"""A copy of a network whose layers are quantized, by what was observed of the original."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from octavo.calibration.observations import Observations
from octavo.calibration.operations import attach_operations, attach_timestep_groups
from octavo.calibration.recipe import PTQ4DM
from octavo.calibration.rules import LayerRule
from octavo.calibration.timestep_scales import TimestepScales
from octavo.errors import OctavoError
from octavo.memory import let_go
from octavo.quantization import (
    AttentionSpecs,
    FakeQuantizer,
    QParams,
    QuantSpec,
    attach_attention,
    quantize_layer,
    round_nearest,
    walk,
)
from octavo.quantization.balancing import divided_weight

RoundedWeight = tuple[torch.Tensor, QParams]


def round_weights(
    denoiser: nn.Module, recipe: PTQ4DM, rules: Mapping[str, LayerRule], *, progress: bool = False
) -> dict[str, RoundedWeight]:
    """Layer name -> integer weight and its parameters, for every layer of `rules`. No activations are needed."""
    layers = dict(walk(denoiser))
    return {
        name: round_nearest(layers[name].weight, rule.weights, recipe.metric)
        for name, rule in tqdm(rules.items(), desc="round", unit="layer", disable=not progress)
    }


def quantize_denoiser(
    denoiser: nn.Module,
    recipe: PTQ4DM,
    rules: Mapping[str, LayerRule],
    operations: Mapping[str, QuantSpec],
    seen: Observations,
    *,
    progress: bool = False,
    weights: Mapping[str, RoundedWeight] | None = None,
    multipliers: Mapping[str, torch.Tensor] | None = None,
    attention: Mapping[str, AttentionSpecs] | None = None,
    by_timestep: TimestepScales | None = None,
) -> nn.Module:
    """A copy of `denoiser` whose layers in `rules` are quantized. Their fp32 weights are never copied.

    `weights`: what `round_weights` gave for the same recipe and rules; what is not there is rounded now.
    `multipliers`: those of the balanced layers; what `seen` holds of these was observed behind them. `attention`: the
    modules whose attention is quantized, of which `seen` must hold all. `by_timestep`: the layers with a scale for each
    group of timesteps.
    """
    layers, factors = dict(walk(denoiser)), multipliers or {}
    grouped = by_timestep or TimestepScales()
    replacements: dict[int, Any] = {}
    for name, rule in tqdm(rules.items(), desc="quantize", unit="layer", disable=not progress):
        if name not in seen.layers and name not in grouped.qparams:
            raise OctavoError(f"{name}: never ran during calibration; exclude it")
        input_qparams = grouped.qparams.get(name) or seen.layers[name].qparams(
            rule.activations, recipe.metric
        )
        m = factors.get(name)
        if weights is not None and name in weights and m is None:
            weight, weight_qparams = weights[name]
        else:
            balanced = layers[name].weight if m is None else divided_weight(layers[name].weight, m)
            weight, weight_qparams = round_nearest(balanced, rule.weights, recipe.metric)
        replacements[id(layers[name])] = quantize_layer(
            layers[name], rule.weights, rule.activations, weight, weight_qparams, input_qparams, m
        )
        let_go([layers[name].weight])
    device = next(denoiser.parameters()).device
    # deepcopy takes what its memo holds for a layer instead of copying the layer
    quantized = copy.deepcopy(denoiser, replacements)
    if grouped.factors:
        attach_timestep_groups(quantized, grouped.groups().to(device), grouped.factors)
    attach_operations(
        quantized,
        {
            name: FakeQuantizer(spec, seen.operations[name].qparams(spec, recipe.metric)).to(device)
            for name, spec in operations.items()
        },
    )
    scales = {
        name: {
            operand: seen.attention[f"{name}.{operand}"].qparams(spec, recipe.metric).scale
            for operand, spec in (("query", specs.query), ("key", specs.key), ("value", specs.value))
        }
        for name, specs in (attention or {}).items()
    }
    attach_attention(quantized, attention or {}, scales, device)
    return quantized.eval()

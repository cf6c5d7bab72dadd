"""From a full-precision pipeline and a recipe to the same pipeline with a quantized denoiser."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from octavo.calibration import bias, output_correction
from octavo.calibration.balanced_network import Balanced, balance
from octavo.calibration.collect import PairStore, collect_pairs
from octavo.calibration.job import job_folder, job_name
from octavo.calibration.observations import Observations, observe
from octavo.calibration.operations import (
    OUTPUT_CORRECTION,
    TIMESTEP_GROUPS,
    attach_operations,
    attach_timestep_groups,
)
from octavo.calibration.recipe import PTQ4DM
from octavo.calibration.rules import LayerRule, attention_rules, rules_of
from octavo.calibration.second_order import round_again, summary
from octavo.calibration.timestep_scales import TimestepScales, timestep_scales
from octavo.calibration.timestep_scales import summary as timestep_summary
from octavo.calibration.tracing import LEARNED_VARIANCE, Trace, trace
from octavo.calibration.unwrap import unwrapped
from octavo.diffusion import find_denoiser
from octavo.errors import OctavoError
from octavo.quantization import (
    AttentionSpecs,
    FakeQuantizer,
    QParams,
    QuantSpec,
    attach_attention,
    quantize_layer,
    quantized_layers,
    round_nearest,
    walk,
)
from octavo.quantization.balancing import divided_weight

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

OPERATIONS = ("network_output", "learned_variance", "sampled_image")
RoundedWeight = tuple[torch.Tensor, QParams]


@dataclass(frozen=True)
class Calibrated:
    """A quantized pipeline with what is to be remembered of how it was made.

    `rules`: layer name -> specs; `operations`: the paper's other operations that are quantized -> spec;
    `calibration`: JSON-safe facts (sampler, steps, seed, batch size); `attention`: owner's name -> specs.
    """

    pipeline: DiffusionPipeline
    component: str
    recipe: PTQ4DM
    rules: dict[str, LayerRule]
    operations: dict[str, QuantSpec]
    calibration: dict[str, Any]
    attention: dict[str, AttentionSpecs] = field(default_factory=dict)


def calibrate(
    pipeline: DiffusionPipeline,
    recipe: PTQ4DM,
    *,
    seed: int = 0,
    batch_size: int = 16,
    inputs: Mapping[str, Any] | None = None,
    workdir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Calibrated:
    """Collect pairs, observe ranges, choose scales, round weights; `pipeline` stays as it was.

    Work in progress is kept in `workdir` (default: Octavo's cache), in a folder named by everything that decides the
    pairs, and removed at the end: the same call after a kill goes on and ends with the same bits. What is wrong with
    the recipe is told before anything is collected.
    """
    pipeline = unwrapped(pipeline)
    component, denoiser = find_denoiser(pipeline)
    if any(True for _ in quantized_layers(denoiser)):
        raise OctavoError(
            f"pipeline: its {component} is quantized already; start from the full-precision model"
        )
    if batch_size < 1:
        raise OctavoError(f"batch_size: {batch_size} is not a number of images from 1")
    _check_finite(component, denoiser)
    traced = trace(pipeline, inputs)
    rules = rules_of(recipe, traced)
    attention = attention_rules(recipe, traced.attention)
    operations = _operations(recipe, traced)
    with job_folder(workdir, job_name(pipeline, recipe, seed, batch_size, inputs)) as work:
        pairs = collect_pairs(
            pipeline, recipe, work, seed=seed, batch_size=batch_size, inputs=inputs, progress=progress
        )
        seen = observe(denoiser, pairs, state_folder=work, progress=progress)
        work_of_recipe = work / _recipe_name(recipe)
        work_of_recipe.mkdir(exist_ok=True)
        balanced = balance(recipe, denoiser, pairs, rules, seen, seed, work_of_recipe, progress)
        by_timestep, grouped = _grouped(
            recipe, balanced.network, pairs, rules, balanced.multipliers, work_of_recipe, progress
        )
        rules = {
            name: replace(
                rule, balanced=name in balanced.multipliers, timestep_groups=by_timestep.groups_of(name)
            )
            for name, rule in rules.items()
        }
        _observe_attention(denoiser, pairs, attention, seen, work, progress)
        quantized = quantize_denoiser(
            balanced.network,
            recipe,
            rules,
            operations,
            seen,
            multipliers=balanced.multipliers,
            attention=attention,
            by_timestep=by_timestep,
            progress=progress,
        )
        rounded = _rounded_again(recipe, quantized, balanced.network, pairs, seed, work_of_recipe, progress)
        corrected = _biases_corrected(recipe, quantized, balanced.network, pairs, traced, progress)
        corrected |= _output_corrected(recipe, quantized, denoiser, pairs, work_of_recipe, progress)
    calibration = {
        **balanced.summary(denoiser),
        **grouped,
        **rounded,
        **corrected,
        "pipeline": type(pipeline).__name__,
        "scheduler": type(pipeline.scheduler).__name__,
        "seed": seed,
        "batch_size": batch_size,
        "edge_layers": list(traced.edges),
        "timestep_layers": list(traced.timestep_layers),
        "torch": torch.__version__,
    }
    return Calibrated(
        with_denoiser(pipeline, component, quantized),
        component,
        recipe,
        rules,
        operations,
        calibration,
        attention,
    )


def _check_finite(component: str, denoiser: nn.Module) -> None:
    """Raise `OctavoError` for a weight that is no number: nothing could be calibrated on what it gives."""
    for name, tensor in (*denoiser.named_parameters(), *denoiser.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise OctavoError(
                f"{component}: {name}: holds NaN or infinity; load the full-precision model again, in float32"
            )


def quantize_observed(
    pipeline: DiffusionPipeline,
    recipe: PTQ4DM,
    seen: Observations,
    traced: Trace,
    *,
    network: bool = True,
    weights: Mapping[str, RoundedWeight] | None = None,
    pairs: PairStore | None = None,
    seed: int = 0,
) -> DiffusionPipeline:
    """The second half of `calibrate`: quantize with what was observed, on whatever pairs that was.

    For experiments: pairs made another way, or many recipes on the same observations. `traced`: what `trace` said of
    the pipeline. `network=False` leaves every layer in float, so that only the recipe's operations are quantized
    (PTQ4DM, table 1). `weights`: what `round_weights` gave for this recipe, to round them once for many calls.
    `pairs`: what was observed, which only `rounding="gptq"`, `balance`, `timestep_groups`, the two corrections and
    `attention_matmuls` need again. `pipeline` stays as it was. Raises `OctavoError` for a recipe that does not fit the
    network.
    """
    component, denoiser = find_denoiser(pipeline)
    again = (
        recipe.rounding != "nearest"
        or recipe.balance
        or recipe.attention_matmuls
        or recipe.timestep_groups > 1
    )
    if pairs is None and (again or recipe.bias_correction or recipe.output_correction):
        raise OctavoError(
            "pairs: rounding 'gptq', balance, timestep_groups, bias_correction, output_correction and "
            "attention_matmuls need the calibration pairs; give them"
        )
    rules = rules_of(recipe, traced) if network else {}
    attention = attention_rules(recipe, traced.attention) if network else {}
    seen, balanced = Observations(dict(seen.layers), seen.operations), Balanced(denoiser)
    by_timestep = TimestepScales()
    if pairs is not None:
        balanced = balance(recipe, denoiser, pairs, rules, seen, seed)
        by_timestep, _ = _grouped(recipe, balanced.network, pairs, rules, balanced.multipliers)
        _observe_attention(denoiser, pairs, attention, seen)
    if weights is not None:  # those of a changed layer are rounded here
        weights = {name: weight for name, weight in weights.items() if name not in balanced.changed()}
    quantized = quantize_denoiser(
        balanced.network,
        recipe,
        rules,
        _operations(recipe, traced),
        seen,
        weights=weights,
        multipliers=balanced.multipliers,
        attention=attention,
        by_timestep=by_timestep,
    )
    if pairs is not None:
        _rounded_again(recipe, quantized, balanced.network, pairs, seed)
        _biases_corrected(recipe, quantized, balanced.network, pairs, traced)
        _output_corrected(recipe, quantized, denoiser, pairs)
    return with_denoiser(pipeline, component, quantized)


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


def _recipe_name(recipe: PTQ4DM) -> str:
    """The job's folder is named by how the pairs are made; what is made of them, the whole recipe decides."""
    return hashlib.sha256(json.dumps(recipe.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


def _grouped(
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


def _observe_attention(
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


def _rounded_again(
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


def _biases_corrected(
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


def _output_corrected(
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


def with_denoiser(pipeline: DiffusionPipeline, component: str, denoiser: nn.Module) -> DiffusionPipeline:
    """A pipeline of the same class and settings with `denoiser` in its place and a scheduler of its own.

    The other components are shared with `pipeline`, which stays as it was.
    """
    other = copy.copy(pipeline)
    other.__dict__.pop("save_pretrained", None)  # bound to the pipeline it was copied from
    setattr(other, component, denoiser)
    other.scheduler = copy.deepcopy(pipeline.scheduler)
    return other


def _operations(recipe: PTQ4DM, traced: Trace) -> dict[str, QuantSpec]:
    wanted = [name for name in OPERATIONS if getattr(recipe, name)]
    if LEARNED_VARIANCE in wanted and not traced.has_variance:
        raise OctavoError("learned_variance: this network predicts no variance; leave it out of the recipe")
    return {name: recipe.activation_spec() for name in wanted}

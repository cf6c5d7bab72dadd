"""From a full-precision pipeline and a recipe to the same pipeline with a quantized denoiser."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from octavo.calibration.collect import IMAGE_STREAM, PairStore, collect_pairs
from octavo.calibration.components import further_components, parts_of, recipe_of, with_part
from octavo.calibration.job import job_folder, job_name
from octavo.calibration.memory_needed import tell_if_short
from octavo.calibration.network import quantize_network, quantize_seen
from octavo.calibration.observations import Observations
from octavo.calibration.parts import Part, calibrate_part, plan_part
from octavo.calibration.quantized_denoiser import RoundedWeight
from octavo.calibration.recipe import PTQ4DM
from octavo.calibration.rules import LayerRule, attention_rules, rules_of
from octavo.calibration.tracing import LEARNED_VARIANCE, Trace, trace
from octavo.calibration.unwrap import unwrapped
from octavo.diffusion import check_rows_alone, find_denoiser, with_denoiser
from octavo.diffusion.analytic import check_no_gamma
from octavo.diffusion.generators import check_seed
from octavo.errors import OctavoError, check_whole
from octavo.memory import give_back
from octavo.quantization import (
    AttentionSpecs,
    QuantSpec,
    quantized_layers,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

OPERATIONS = ("network_output", "learned_variance", "sampled_image")


@dataclass(frozen=True)
class Calibrated:
    """A quantized pipeline with what is to be remembered of how it was made.

    `rules`: layer name -> specs; `operations`: the paper's other operations that are quantized -> spec;
    `calibration`: JSON-safe facts (sampler, steps, seed, batch size); `attention`: owner's name -> specs. `further`:
    the same of each other component that is quantized, in the same pipeline.
    """

    pipeline: DiffusionPipeline
    component: str
    recipe: PTQ4DM
    rules: dict[str, LayerRule]
    operations: dict[str, QuantSpec]
    calibration: dict[str, Any]
    attention: dict[str, AttentionSpecs] = field(default_factory=dict)
    further: tuple[Calibrated, ...] = ()


def calibrate(
    pipeline: DiffusionPipeline,
    recipe: PTQ4DM,
    *,
    seed: int = 0,
    batch_size: int = 16,
    inputs: Mapping[str, Any] | None = None,
    workdir: str | os.PathLike[str] | None = None,
    components: Sequence[str] | None = None,
    progress: bool = True,
) -> Calibrated:
    """Collect pairs, observe ranges, choose scales, round weights; `pipeline` stays as it was.

    Work in progress is kept in `workdir` (default: Octavo's cache), in a folder named by everything that decides the
    pairs, and removed at the end: the same call after a kill goes on and ends with the same bits. The number of torch's
    threads is part of the name: on another one the call starts anew, since its sums may round otherwise. What is wrong
    with the recipe is told before anything is collected (`planned`). `components`: what is quantized, the denoiser
    among them; None: the denoiser alone (`octavo.calibration.components`).
    """
    check_seed(seed, IMAGE_STREAM, recipe.samples)
    plan = planned(pipeline, recipe, batch_size=batch_size, inputs=inputs, components=components)
    pipeline, component, denoiser = plan.pipeline, plan.component, plan.denoiser
    traced, rules, parts = plan.traced, plan.rules, plan.parts
    give_back()
    tell_if_short(denoiser, plan.recipe, rules)
    with job_folder(workdir, job_name(pipeline, recipe, seed, batch_size, inputs)) as work:
        pairs = collect_pairs(
            pipeline, recipe, work, seed=seed, batch_size=batch_size, inputs=inputs, progress=progress
        )
        quantized, rules, facts = quantize_network(
            denoiser,
            plan.recipe,
            rules,
            pairs,
            traced,
            work,
            operations=plan.operations,
            attention=plan.attention,
            seed=seed,
            progress=progress,
        )
        made = {
            part.component: calibrate_part(
                pipeline,
                part,
                work / part.component,
                seed=seed,
                batch_size=batch_size,
                inputs=inputs,
                progress=progress,
            )
            for part in parts
        }
    calibration = {
        **facts,
        "pipeline": type(pipeline).__name__,
        "scheduler": type(pipeline.scheduler).__name__,
        "seed": seed,
        "batch_size": batch_size,
        "edge_layers": list(traced.edges),
        "timestep_layers": list(traced.timestep_layers),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    result = with_denoiser(pipeline, component, quantized)
    for name, (part, _, _) in made.items():
        result = with_part(result, name, part)
    return Calibrated(
        result,
        component,
        recipe,
        rules,
        plan.operations,
        calibration,
        plan.attention,
        tuple(
            Calibrated(result, name, recipe, of_part, {}, facts) for name, (_, of_part, facts) in made.items()
        ),
    )


@dataclass(frozen=True)
class Planned:
    """What a calibration is to do, held against the pipeline: `recipe` is the denoiser's share of it."""

    pipeline: DiffusionPipeline
    component: str
    denoiser: nn.Module
    recipe: PTQ4DM
    traced: Trace
    rules: dict[str, LayerRule]
    attention: dict[str, AttentionSpecs]
    operations: dict[str, QuantSpec]
    parts: list[Part]


def planned(
    pipeline: DiffusionPipeline,
    recipe: PTQ4DM,
    *,
    batch_size: int = 16,
    inputs: Mapping[str, Any] | None = None,
    components: Sequence[str] | None = None,
) -> Planned:
    """All that `calibrate` checks before anything is collected, by one call of the network; see there for arguments.

    Raises `OctavoError` for what is wrong with the recipe, the inputs, the components, or the pipeline: one that is
    quantized already, has weights that are no numbers, or optimal variances.
    """
    check_whole("batch_size", batch_size, 1)
    check_rows_alone(pipeline)
    pipeline = unwrapped(pipeline)
    component, denoiser = find_denoiser(pipeline)
    further = further_components(pipeline, components)
    for name, network in ((component, denoiser), *parts_of(pipeline)):
        if name not in (component, *further):
            continue
        if any(True for _ in quantized_layers(network)):
            raise OctavoError(
                f"pipeline: its {name} is quantized already; start from the full-precision model"
            )
        _check_weights(name, network)
    check_no_gamma(pipeline)
    traced = trace(pipeline, inputs)
    own_recipe = recipe_of(recipe, None, further)
    return Planned(
        pipeline,
        component,
        denoiser,
        own_recipe,
        traced,
        rules_of(own_recipe, traced),
        attention_rules(own_recipe, traced.attention),
        _operations(own_recipe, traced),
        [
            plan_part(pipeline, name, network, recipe_of(recipe, name, further), inputs)
            for name, network in parts_of(pipeline)
            if name in further
        ],
    )


def _check_weights(component: str, denoiser: nn.Module) -> None:
    """Raise `OctavoError` for a weight that is no number or is not there: nothing could be calibrated on it."""
    for name, tensor in (*denoiser.named_parameters(), *denoiser.named_buffers()):
        if tensor.is_meta:
            raise OctavoError(
                f"{component}: {name}: is offloaded; quantize the pipeline as from_pretrained gives it: its weights "
                "are read from their file as they are needed (enable_model_cpu_offload works too)"
            )
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
    `pairs`: what was observed, which only `rounding="gptq"`, `balance`, `float_activations`, `timestep_groups`, the two
    corrections and `attention_matmuls` need again. `pipeline` stays as it was. Raises `OctavoError` for a recipe that
    does not fit the network.
    """
    component, denoiser = find_denoiser(pipeline)
    again = (
        recipe.rounding != "nearest"
        or recipe.balance
        or recipe.attention_matmuls
        or recipe.timestep_groups > 1
        or recipe.float_activations > 0
    )
    if pairs is None and (again or recipe.bias_correction or recipe.output_correction):
        raise OctavoError(
            "pairs: rounding 'gptq', balance, float_activations, timestep_groups, bias_correction, output_correction "
            "and attention_matmuls need the calibration pairs; give them"
        )
    quantized, _, _ = quantize_seen(
        denoiser,
        recipe,
        rules_of(recipe, traced) if network else {},
        seen,
        traced,
        pairs=pairs,
        operations=_operations(recipe, traced),
        attention=attention_rules(recipe, traced.attention) if network else {},
        weights=weights,
        seed=seed,
    )
    return with_denoiser(pipeline, component, quantized)


def _operations(recipe: PTQ4DM, traced: Trace) -> dict[str, QuantSpec]:
    wanted = [name for name in OPERATIONS if getattr(recipe, name)]
    if LEARNED_VARIANCE in wanted and not traced.has_variance:
        raise OctavoError("learned_variance: this network predicts no variance; leave it out of the recipe")
    return {name: recipe.activation_spec() for name in wanted}

"""Components besides the denoiser (a VAE's decoder), calibrated on what the pipeline's own runs hand to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from octavo.calibration.collect import IMAGE_STREAM, PairStore
from octavo.calibration.components import part_prefix
from octavo.calibration.network import quantize_network
from octavo.calibration.recipe import PTQ4DM
from octavo.calibration.rules import LayerRule, rules_of
from octavo.calibration.tracing import Trace, evaluating, trace_network
from octavo.diffusion import find_denoiser, first_part_call, generators, inputs_of_images, part_calls

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Part:
    """A component's part before it is calibrated: how, and what one evaluation of it shows.

    `recipe` and `rules` name layers as they are named within `network`.
    """

    component: str
    network: nn.Module
    recipe: PTQ4DM
    rules: dict[str, LayerRule]
    traced: Trace


def plan_part(
    pipeline: DiffusionPipeline,
    component: str,
    network: nn.Module,
    recipe: PTQ4DM,
    inputs: Mapping[str, Any] | None,
) -> Part:
    """Raises `OctavoError` for patterns that match none of its layers, before anything is collected."""
    traced = trace_network(network, first_part_call(pipeline, network, inputs=inputs))
    return Part(component, network, recipe, rules_of(recipe, traced), traced)


def calibrate_part(
    pipeline: DiffusionPipeline,
    part: Part,
    work: Path,
    *,
    seed: int,
    batch_size: int,
    inputs: Mapping[str, Any] | None,
    progress: bool,
) -> tuple[nn.Module, dict[str, LayerRule], dict[str, Any]]:
    """The part's quantized copy; rules by layer within the component, and what is to be remembered.

    As many images as the denoiser's calibration starts (samples / pairs_per_trajectory) are made to the end, by the
    full-precision pipeline from the same noise, and the part's calls are caught: whatever the pipeline does to latents
    before it decodes them is done. Finished batches are kept in `work`.
    """
    work.mkdir(exist_ok=True)
    count = -(-part.recipe.samples // part.recipe.pairs_per_trajectory)
    starts = range(0, count, batch_size)
    store = PairStore(work, len(starts))
    for i, first in enumerate(tqdm(starts, desc=f"images for {part.component}", disable=not progress)):
        if store.has(i):
            continue
        images = range(first, min(count, first + batch_size))
        with evaluating(part.network), evaluating(find_denoiser(pipeline)[1]):
            calls = part_calls(
                pipeline,
                part.network,
                generators=generators(seed + IMAGE_STREAM, first, len(images)),
                num_inference_steps=part.recipe.steps,
                inputs=inputs_of_images(inputs or {}, images, pipeline),
            )
        store.save(i, calls)
    quantized, rules, facts = quantize_network(
        part.network, part.recipe, part.rules, store, part.traced, work, seed=seed, progress=progress
    )
    prefix = part_prefix(part.component)
    return (
        quantized,
        {f"{prefix}{name}": rule for name, rule in rules.items()},
        {
            **facts,
            "pipeline": type(pipeline).__name__,
            "scheduler": type(pipeline.scheduler).__name__,
            "seed": seed,
            "batch_size": batch_size,
            "images": count,
            "edge_layers": [f"{prefix}{name}" for name in part.traced.edges],
            "torch": torch.__version__,
        },
    )

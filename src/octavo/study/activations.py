"""The activation distribution over time (the paper's figure 3): every quantized layer's input, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from octavo.diffusion import find_denoiser
from octavo.evaluation.activation_ranges import (
    QUANTILES,
    ActivationRange,
    activation_ranges,
    layers_worth_showing,
)
from octavo.evaluation.trajectory import trajectory
from octavo.study.samplers import Sampler

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

NUM_IMAGES = 16
MOST_STEPS = 11


def activations_over_time(
    reference: DiffusionPipeline,
    quantized: DiffusionPipeline,
    sampler: Sampler,
    *,
    seed: int = 0,
    inputs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Quantiles of each quantized layer's input in the full-precision network, at 11 steps of a trajectory (JSON).

    `drift`: the widest range (0.1 % to 99.9 %) of a layer over its narrowest; 1 for a distribution that does not
    move. The scale is the one that `quantized` chose for all steps. Both pipelines are on the sampler already.
    """
    _, float_denoiser = find_denoiser(reference)
    _, denoiser = find_denoiser(quantized)
    steps = trajectory(
        reference,
        num_images=NUM_IMAGES,
        steps=sampler.steps,
        seed=seed,
        max_steps=MOST_STEPS,
        inputs=inputs,
    )
    found = activation_ranges(denoiser, float_denoiser, steps)
    return {
        "format": 1,
        "sampler": str(sampler),
        "num_images": NUM_IMAGES,
        "quantiles": list(QUANTILES),
        "layers": [_layer(one) for one in found],
        "worth_showing": layers_worth_showing(found, [], count=6),
    }


def _layer(one: ActivationRange) -> dict[str, Any]:
    return {
        "layer": one.layer,
        "timesteps": list(one.timesteps),
        "minimum": one.minimum.tolist(),
        "maximum": one.maximum.tolist(),
        "quantile_values": one.quantiles.tolist(),
        "outside": one.outside.tolist(),
        "scale": one.chosen.scale,
        "zero_point": one.chosen.zero_point,
        "bits": one.chosen.bits,
        "low": one.chosen.low,
        "high": one.chosen.high,
        "drift": one.drift,
    }

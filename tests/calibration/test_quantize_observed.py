"""The two halves of `calibrate`, taken apart: observing on any pairs, and quantizing with what was observed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from octavo.calibration import (
    collect_pairs,
    layer_rules,
    observe,
    quantize_observed,
    round_weights,
    trace,
)
from octavo.errors import OctavoError
from octavo.quantization import quantized_layers


@pytest.fixture(scope="module")
def seen(pipeline, recipe, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    pairs = collect_pairs(pipeline, recipe, tmp_path_factory.mktemp("pairs"), batch_size=4, progress=False)
    return observe(pipeline.unet, pairs, progress=False)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_halves_together_are_calibrate(pipeline, recipe, quantized, seen) -> None:  # type: ignore[no-untyped-def]
    traced = trace(pipeline)
    other = quantize_observed(pipeline, recipe, seen, traced)
    assert same(other.unet, quantized.unet) and other.scheduler is not pipeline.scheduler
    rules = layer_rules(recipe, traced.executed, traced.edges)
    weights = round_weights(pipeline.unet, recipe, rules)
    assert same(quantize_observed(pipeline, recipe, seen, traced, weights=weights).unet, quantized.unet)


def test_given_weights_are_taken(pipeline, recipe, seen) -> None:  # type: ignore[no-untyped-def]
    traced = trace(pipeline)
    rules = layer_rules(recipe, traced.executed, traced.edges)
    zeros = {
        name: (torch.zeros_like(weight), qparams)
        for name, (weight, qparams) in round_weights(pipeline.unet, recipe, rules).items()
    }
    other = quantize_observed(pipeline, recipe, seen, traced, weights=zeros)
    assert not any(layer.weight_int8.any() for _, layer in quantized_layers(other.unet))


def test_weights_given_within_the_limit_are_not_for_float_activations(pipeline, recipe, seen) -> None:  # type: ignore[no-untyped-def]
    """They are rounded before it is known which layers have these, and there is no limit for such."""
    traced, limited = trace(pipeline), replace(recipe, pair_limit=True, time_embedding="weights")
    weights = round_weights(pipeline.unet, limited, layer_rules(limited, traced.executed, traced.edges))
    assert traced.timestep_layers and all(name in weights for name in traced.timestep_layers)
    other = quantize_observed(pipeline, limited, seen, traced, weights=weights)
    assert same(other.unet, quantize_observed(pipeline, limited, seen, traced).unet)


def test_without_the_network_no_layer_is_quantized(pipeline, recipe, seen) -> None:  # type: ignore[no-untyped-def]
    alone = quantize_observed(pipeline, recipe, seen, trace(pipeline), network=False)
    assert same(alone.unet, pipeline.unet) and not list(quantized_layers(alone.unet))


def test_a_recipe_that_does_not_fit_is_told(pipeline, recipe, seen) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(OctavoError, match="learned_variance"):
        quantize_observed(pipeline, replace(recipe, learned_variance=True), seen, trace(pipeline))

"""A network's pairs, its rules and what was observed, for all that looks at the pairs again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from diffusers import DDIMPipeline

import octavo
from octavo.calibration import collect_pairs, observe, rules_of, trace
from octavo.quantization import QuantSpec


@pytest.fixture(scope="session")
def calibrated(pipeline: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """(network, pairs, rules, observations) of the tiny pipeline: one batch of 16 pairs."""
    recipe = octavo.PTQ4DM(samples=16, steps=4, pairs_per_trajectory=4)
    folder = tmp_path_factory.mktemp("pairs")
    pairs = collect_pairs(pipeline, recipe, folder, seed=0, batch_size=4, progress=False)
    seen = observe(pipeline.unet, pairs, progress=False)
    return pipeline.unet, pairs, rules_of(recipe, trace(pipeline)), seen


@pytest.fixture(scope="session")
def coarse(calibrated: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
    """A shortcut's name, and `calibrated` with 2 bits for its activations."""
    network, pairs, rules, seen = calibrated
    name = next(name for name in rules if name.endswith("conv_shortcut"))
    worse = {**rules, name: replace(rules[name], activations=QuantSpec(2, symmetric=False))}
    return name, (network, pairs, worse, seen)

"""The default recipe on every family: GPTQ, balancing, the timestep's layers as a table, float activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny_families import FAMILIES, build

import octavo
from octavo.diffusion import find_denoiser, first_call
from octavo.quantization import integer_layers, quantized_layers
from octavo.runtimes.saturation import adds_in_16_bits

# diffusers' schedulers hand torch tensors to NumPy, of which torch 2.13 and NumPy 2 together warn.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_default_recipe_is_saved_and_runs_in_int8(name: str, tmp_path: Path) -> None:
    original, inputs = build(name)
    # on a CPU without VNNI as it is told to take it, and as it is without
    limited = adds_in_16_bits() and name not in ("unconditional", "svd")
    sizes = {"samples": 6, "steps": 2, "pairs_per_trajectory": 2}  # batches of 2 and 1
    recipe = octavo.named_recipe("best", **sizes, pair_limit=limited)
    quantized = octavo.quantize(original, recipe, batch_size=2, inputs=inputs, progress=False)
    quantized.save_pretrained(tmp_path / "int8")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "int8")
    fast = octavo.accelerate(loaded, precision="f32", batch_size=3, inputs=inputs)

    _, denoiser = find_denoiser(loaded)
    rows = octavo.audit(fast)
    integer = {layer for layer, _ in integer_layers(denoiser)}
    assert all(row.ok for row in rows) and len(rows) >= len(integer) > 10
    assert len(integer) < len(dict(quantized_layers(denoiser))), (
        "the timestep's layers have float activations"
    )

    exact, made, simulated, executed = (
        _evaluate(pipeline, inputs) for pipeline in (original, quantized, loaded, fast)
    )
    assert torch.equal(made, simulated)
    error = (simulated - exact).norm()
    assert 0 < error < 0.1 * exact.norm()
    assert 0 < (executed - simulated).norm() < error


def _evaluate(pipeline: Any, inputs: dict[str, Any]) -> torch.Tensor:
    args, kwargs = first_call(pipeline, batch_size=3, inputs=inputs)
    with torch.no_grad():
        output: torch.Tensor = find_denoiser(pipeline)[1](*args, **{**kwargs, "return_dict": False})[0]
    return output

"""Where no value is rounded the other way, the engine computes the simulation to float32 precision.

Activations of 3 bits have so few borders that a value seldom lies on one; with 8 bits one does in every evaluation of
a U-Net of this size, and hides whatever else differs behind it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import build

import octavo
from octavo.diffusion import find_denoiser, first_call, inputs_of_images

# diffusers' schedulers hand torch tensors to NumPy, of which torch 2.13 and NumPy 2 together warn.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
RECIPE = octavo.PTQ4DM(samples=3, steps=3, activations=3, metric="minmax")
DRAWS = 6


@pytest.mark.parametrize("family", ["sd", "inpaint", "controlnet", "sdxl", "video_unet", "svd"])
def test_without_rounding_flips_the_engine_is_the_simulation(family: str) -> None:
    """Scales, zero points, padding, attention and conditions, in every layer at once."""
    original, inputs = build(family)
    quantized = octavo.quantize(original, RECIPE, batch_size=3, inputs=inputs, progress=False)
    given = inputs_of_images(inputs, [0])
    fast = octavo.accelerate(quantized, precision="f32", batch_size=1, inputs=given)
    assert all(row.ok for row in octavo.audit(fast))
    args, kwargs = first_call(quantized, batch_size=1, inputs=given)
    generator = torch.Generator().manual_seed(0)
    differences = []
    for _ in range(DRAWS):
        drawn = [_disturbed(value, generator) for value in args]
        drawn_by_name = {name: _disturbed(value, generator) for name, value in kwargs.items()}
        with torch.no_grad():
            simulated, executed = (
                find_denoiser(pipeline)[1](*drawn, **{**drawn_by_name, "return_dict": False})[0]
                for pipeline in (quantized, fast)
            )
        differences.append(float((executed - simulated).norm() / simulated.norm()))
    assert min(differences) > 0 and sorted(differences)[DRAWS // 2] < 2e-6, differences


def _disturbed(value: Any, generator: torch.Generator) -> Any:
    """Noise added to images and states, so that some activations saturate; timesteps stay."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.ndim < 2:
        return value
    return value + 0.3 * torch.randn(value.shape, generator=generator)

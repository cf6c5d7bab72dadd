"""Calibration sees what the pipeline is given: each image its own prompt and picture, by the pipeline's own call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import PICTURES, PROMPTS, build, picture

from octavo.diffusion import capture_pairs, generators

# diffusers' schedulers hand torch tensors to NumPy, of which torch 2.13 and NumPy 2 together warn.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
STEPS, SEED = 2, 5


def _handed(pipeline: Any, k: int, **given: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the network is handed at each step of one image, sampled by the user: image and text states."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((args[0].clone(), kwargs["encoder_hidden_states"].clone()))

    hook = pipeline.unet.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        pipeline(generator=generators(SEED, k, 1), num_inference_steps=STEPS, output_type="latent", **given)
    finally:
        hook.remove()
    return seen


def test_each_image_has_its_own_prompt_picture_and_mask() -> None:
    """The nine channels of inpainting: latents, the mask, and the latents of what it leaves of the picture."""
    pipeline, inputs = build("inpaint")
    steps_left = [[2], [1], [1, 2]]
    pairs = capture_pairs(
        pipeline, steps_left, generators=generators(SEED, 0, 3), num_inference_steps=STEPS, inputs=inputs
    )
    assert [(pair.image, pair.steps_left) for pair in pairs] == [(0, 2), (1, 1), (2, 1), (2, 2)]
    for pair in pairs:
        k = pair.image
        alone = {**inputs, "prompt": PROMPTS[k], "image": PICTURES[k], "mask_image": picture(0, "L")}
        sample, states = _handed(pipeline, k, **alone)[pair.step]
        close = {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(pair.args["sample"], sample, **close)
        torch.testing.assert_close(pair.args["encoder_hidden_states"], states, **close)
        assert set(pair.args["sample"][:, 4].unique().tolist()) == {0.0, 1.0}, "half of the mask is white"
        other = _handed(pipeline, k, **{**alone, "image": PICTURES[k - 1]})[pair.step][0]
        assert not torch.allclose(pair.args["sample"][:, 5:], other[:, 5:], **close)

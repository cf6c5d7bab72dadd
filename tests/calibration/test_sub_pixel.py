"""The recipe's sub-pixel convolutions: quantized, saved, loaded, executed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline
from tiny import tiny_pipeline
from tiny_families import build

import octavo
from octavo.calibration import collect_pairs, trace
from octavo.calibration.bias import correct_biases
from octavo.calibration.evaluate import evaluate
from octavo.checkpoint import tensor_bytes
from octavo.checkpoint.save import float32_bytes
from octavo.diffusion import find_denoiser
from octavo.evaluation.layer_error import layer_errors
from octavo.evaluation.trajectory import trajectory
from octavo.fingerprint import model_identity, same_model
from octavo.quantization import SubPixelUpsample2D, quantized_layers, with_sub_pixel

LAYER = "up_blocks.0.upsamplers.0.conv"
RECIPE = octavo.PTQ4DM(samples=8, steps=4, pairs_per_trajectory=4, sub_pixel=True)


def evaluated(pipeline: Any, size: int = 8) -> torch.Tensor:
    _, denoiser = find_denoiser(pipeline)
    generator = torch.Generator().manual_seed(0)
    kwargs: dict[str, Any] = {
        "sample": torch.randn(2, denoiser.config["in_channels"], size, size, generator=generator)
    }
    if "cross_attention_dim" in denoiser.config:
        kwargs["encoder_hidden_states"] = torch.randn(
            2, 4, denoiser.config["cross_attention_dim"], generator=generator
        )
    with torch.no_grad():
        output: torch.Tensor = denoiser(**kwargs, timestep=torch.tensor([500, 20]), return_dict=False)[0]
    return output


@pytest.fixture(scope="module")
def original() -> DDIMPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def quantized(original: DDIMPipeline) -> Any:
    return octavo.quantize(original, RECIPE, batch_size=2, progress=False)


def test_the_layer_reads_the_small_image(original: DDIMPipeline, quantized: Any) -> None:
    layer: Any = dict(quantized_layers(quantized.unet))[LAYER]
    assert layer.weight_int8.shape == (4 * 32, 32, 2, 2) and int(layer.weight_int8.abs().max()) == 127
    assert type(original.unet.up_blocks[0].upsamplers[0]).__name__ == "Upsample2D", (
        "the original is as it was"
    )
    plain = octavo.quantize(
        original, octavo.PTQ4DM(samples=8, steps=4, pairs_per_trajectory=4), progress=False
    )
    exact, with_it, without = (evaluated(pipeline) for pipeline in (original, quantized, plain))
    assert 0 < (with_it - exact).norm() < 1.5 * (without - exact).norm()
    old: Any = dict(quantized_layers(plain.unet))[LAYER]
    assert layer.input_scale == old.input_scale and layer.input_zero_point == old.input_zero_point


def test_saved_loaded_and_executed(original: DDIMPipeline, quantized: Any, tmp_path: Path) -> None:
    quantized.save_pretrained(tmp_path / "int8")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "int8")
    assert isinstance(loaded.unet.up_blocks[0].upsamplers[0], SubPixelUpsample2D)
    simulated = evaluated(loaded)
    assert torch.equal(simulated, evaluated(quantized))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(evaluated(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again")), simulated)
    fast = octavo.accelerate(loaded, precision="f32", batch_size=2)
    rows = octavo.audit(fast)
    assert all(row.ok for row in rows) and LAYER in {row.layer for row in rows}
    error = (simulated - evaluated(original)).norm()
    assert (evaluated(fast) - simulated).norm() < 0.5 * error
    identity = model_identity(original.unet)
    assert {model_identity(pipeline.unet) for pipeline in (quantized, loaded, fast)} == {identity}
    assert not same_model(model_identity(tiny_pipeline(seed=1).unet), identity)


@pytest.fixture(scope="module")
def by_text() -> tuple[Any, Any, Any]:
    original, inputs = build("sd")
    quantized = octavo.quantize(original, RECIPE, batch_size=2, inputs=inputs, progress=False)
    assert any(isinstance(module, SubPixelUpsample2D) for module in quantized.unet.modules())
    return original, quantized, octavo.accelerate(quantized, precision="f32", batch_size=2, inputs=inputs)


@pytest.mark.parametrize("size", [8, 7, 5])
def test_image_sizes_that_do_not_halve(by_text: tuple[Any, Any, Any], size: int) -> None:
    """What the network upsamples is a row and a column less than twice the small image."""
    original, quantized, fast = by_text
    exact, simulated, executed = (evaluated(pipeline, size) for pipeline in (original, quantized, fast))
    assert (simulated - exact).norm() < 0.1 * exact.norm()
    assert (executed - simulated).norm() < (simulated - exact).norm()
    assert all(row.ok for row in octavo.audit(fast))


def test_each_layer_is_held_against_the_float_one_that_it_stands_for(
    original: DDIMPipeline, quantized: Any
) -> None:
    """What `octavo report` shows: on an input like the layer's own, it errs as little as its neighbours."""
    steps = trajectory(original, num_images=2, steps=2)
    found = layer_errors(quantized.unet, original.unet, steps)
    errors = dict(zip(found.layers, np.nanmean(found.errors, 1), strict=True))
    assert LAYER in errors and 0 < errors[LAYER] < 2 * np.median(list(errors.values()))


def test_sizes_are_told_of_the_original(original: DDIMPipeline, quantized: Any) -> None:
    in_float32 = tensor_bytes(original.unet)
    assert float32_bytes(quantized.unet) == float32_bytes(original.unet) == in_float32
    changed = with_sub_pixel(original.unet, [LAYER])
    assert float32_bytes(changed) == in_float32 < tensor_bytes(changed)


def test_mean_errors_are_taken_out_of_the_biases(original: DDIMPipeline, tmp_path: Path) -> None:
    """Of each place of the block, over the rows and columns that are used."""
    pairs = collect_pairs(original, RECIPE, tmp_path, batch_size=2, progress=False)
    outputs: list[torch.Tensor] = []

    def mean_output(network: torch.nn.Module) -> torch.Tensor:
        """[a, b, channel]"""
        hook = network.get_submodule(LAYER.rpartition(".")[0]).register_forward_hook(
            lambda module, args, y: outputs.append(y.double())
        )
        with torch.inference_mode():
            evaluate(network, pairs)
        hook.remove()
        y = torch.cat(outputs)
        outputs.clear()
        return y.view(len(y), 32, 4, 2, 4, 2).mean((0, 2, 4)).permute(1, 2, 0)

    coarse = octavo.quantize(original, replace(RECIPE, weights=3), batch_size=2, progress=False).unet
    wanted = mean_output(original.unet)
    before = (mean_output(coarse) - wanted).square().mean().sqrt()
    order = trace(original).executed
    changed = with_sub_pixel(original.unet, [LAYER])
    correct_biases(coarse, changed, pairs, order, passes=len(order), progress=False)
    assert (mean_output(coarse) - wanted).square().mean().sqrt() < 0.01 * before


def test_excluded_layers_upsample_as_ever(original: DDIMPipeline) -> None:
    recipe = octavo.named_recipe("ptq4dm", samples=2, steps=2, sub_pixel=True, exclude=("*upsamplers*",))
    quantized = octavo.quantize(original, recipe, progress=False)
    assert type(quantized.unet.up_blocks[0].upsamplers[0]).__name__ == "Upsample2D"


@pytest.mark.parametrize("layer", ["up_blocks.0.resnets.0.conv1", "mid_block.attentions.0.to_q"])
def test_a_configuration_that_names_another_layer_is_refused(
    quantized: Any, tmp_path: Path, layer: str
) -> None:
    quantized.save_pretrained(tmp_path / "int8")
    path = tmp_path / "int8" / "unet" / "config.json"
    config = json.loads(path.read_text())
    for group in config["quantization_config"]["layers"]:
        if group.get("sub_pixel"):
            group["names"] = [layer]
        elif layer in group["names"]:
            group["names"][group["names"].index(layer)] = LAYER
    path.write_text(json.dumps(config))
    with pytest.raises(octavo.OctavoError, match=f"has no layer '{layer}' that can be quantized"):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path / "int8")
    config["quantization_config"]["layers"][0]["sub_pixel"] = 1
    path.write_text(json.dumps(config))
    with pytest.raises(octavo.OctavoError, match="sub_pixel: 1 is neither true nor false"):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path / "int8")

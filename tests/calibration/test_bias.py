"""Bias correction: what quantization adds to a layer's outputs on average goes out of its bias, and nothing else."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline

import octavo
from octavo.calibration import collect_pairs, observe, quantize_observed, trace
from octavo.calibration.bias import correct_biases
from octavo.calibration.collect import PairStore
from octavo.calibration.evaluate import evaluate
from octavo.errors import OctavoError
from octavo.quantization import quantized_layers

RECIPE = octavo.PTQ4DM(weights=3, activations=5, samples=16, steps=4, pairs_per_trajectory=2)


@pytest.fixture(scope="module")
def small(make_pipeline) -> DDIMPipeline:  # type: ignore[no-untyped-def]
    """Of its layers some have no bias, as the projections of many published models."""
    pipeline: DDIMPipeline = make_pipeline(seed=2)
    for name in ("to_q", "to_k", "to_v"):
        getattr(pipeline.unet.mid_block.attentions[0], name).bias = None
    return pipeline


@pytest.fixture(scope="module")
def pairs(small: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> PairStore:
    return collect_pairs(small, RECIPE, tmp_path_factory.mktemp("pairs"), batch_size=4, progress=False)


@pytest.fixture(scope="module")
def coarse(small: DDIMPipeline) -> DDIMPipeline:
    return octavo.quantize(small, RECIPE, batch_size=4, progress=False)


@pytest.fixture(scope="module")
def order(small: DDIMPipeline) -> tuple[str, ...]:
    return trace(small).executed


def mean_outputs(network: torch.nn.Module, pairs: PairStore, names: list[str]) -> dict[str, torch.Tensor]:
    """The oracle: every output of every layer kept, then one mean."""
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def keep(name: str):  # type: ignore[no-untyped-def]
        def hook(layer, args, y):  # type: ignore[no-untyped-def]
            by_channel = y.movedim(1, -1) if y.ndim == 4 else y
            outputs[name].append(by_channel.reshape(-1, by_channel.shape[-1]).double())

        return hook

    hooks = [network.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with torch.inference_mode():
        evaluate(network, pairs)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows).mean(0) for name, rows in outputs.items()}


def errors(small: DDIMPipeline, unet: torch.nn.Module, pairs: PairStore) -> torch.Tensor:
    """The root mean square, over a layer's channels, of its mean output error: one for each layer with a bias."""
    names = [name for name, layer in quantized_layers(unet) if layer.bias is not None]
    ours, theirs = mean_outputs(unet, pairs, names), mean_outputs(small.unet, pairs, names)
    return torch.stack([(ours[name] - theirs[name]).square().mean().sqrt() for name in names])


def test_a_pass_for_each_layer_leaves_no_mean_error(
    small: DDIMPipeline, coarse: DDIMPipeline, pairs: PairStore, order: tuple[str, ...]
) -> None:
    unet = copy.deepcopy(coarse.unet)
    before = errors(small, unet, pairs)
    rows = correct_biases(unet, small.unet, pairs, order, passes=len(order), progress=False)
    layers = dict(quantized_layers(unet))
    assert [row.layer for row in rows] == [
        name for name in order if name in layers and layers[name].bias is not None
    ]
    assert float((errors(small, unet, pairs) / before).max()) < 1e-4


def test_one_pass_leaves_little_of_it(
    small: DDIMPipeline, coarse: DDIMPipeline, pairs: PairStore, order: tuple[str, ...]
) -> None:
    unet = copy.deepcopy(coarse.unet)
    before = errors(small, unet, pairs)
    correct_biases(unet, small.unet, pairs, order, progress=False)
    assert float((errors(small, unet, pairs) / before).median()) < 0.4


def test_biases_alone_change_and_no_hook_stays(
    small: DDIMPipeline, coarse: DDIMPipeline, pairs: PairStore, order: tuple[str, ...]
) -> None:
    unet, original = copy.deepcopy(coarse.unet), copy.deepcopy(small.unet.state_dict())
    correct_biases(unet, small.unet, pairs, order, progress=False)
    biases = {f"{name}.bias" for name, layer in quantized_layers(unet) if layer.bias is not None}
    assert "mid_block.attentions.0.to_q.bias" not in unet.state_dict()
    assert unet.state_dict().keys() == coarse.unet.state_dict().keys()
    for name, tensor in unet.state_dict().items():
        assert torch.equal(tensor, coarse.unet.state_dict()[name]) != (name in biases), name
        assert tensor.dtype == coarse.unet.state_dict()[name].dtype
    assert all(torch.equal(tensor, original[name]) for name, tensor in small.unet.state_dict().items())
    modules = [*unet.modules(), *small.unet.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_no_pass_is_refused(
    small: DDIMPipeline, coarse: DDIMPipeline, pairs: PairStore, order: tuple[str, ...]
) -> None:
    with pytest.raises(OctavoError, match="passes: 0 is not a whole number from 1"):
        correct_biases(coarse.unet, small.unet, pairs, order, passes=0)


def test_the_recipe_asks_for_it_after_rounding_and_gets_the_same_bits_each_time(
    small: DDIMPipeline, coarse: DDIMPipeline, pairs: PairStore, order: tuple[str, ...], tmp_path: Path
) -> None:
    recipe = dataclasses.replace(RECIPE, bias_correction=True)
    ours = octavo.quantize(small, recipe, batch_size=4, progress=False).unet.state_dict()
    again = octavo.quantize(small, recipe, batch_size=4, progress=False, workdir=tmp_path).unet.state_dict()
    unet = copy.deepcopy(coarse.unet)
    correct_biases(unet, small.unet, pairs, order, progress=False)
    for name, tensor in unet.state_dict().items():
        assert torch.equal(tensor, ours[name]) and torch.equal(tensor, again[name]), name


def test_the_checkpoint_says_so_and_carries_it_to_real_int8(pipeline: DDIMPipeline, tmp_path: Path) -> None:
    recipe = octavo.PTQ4DM(samples=8, steps=4, bias_correction=True)
    ours = octavo.quantize(pipeline, recipe, batch_size=4, progress=False)
    ours.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "unet/config.json").read_text())["quantization_config"]
    assert config["recipe"]["bias_correction"] is True
    assert config["calibration"]["bias_correction"]["layers"] == len(config["layers"][0]["names"])
    loaded = octavo.load(tmp_path)
    for name, tensor in ours.unet.state_dict().items():
        assert torch.equal(tensor, loaded.unet.state_dict()[name]), name
    fast = octavo.accelerate(loaded, precision="f32")
    assert all(row.ok for row in octavo.audit(fast))
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert float((fast.unet(x, 400).sample - ours.unet(x, 400).sample).abs().max()) < 0.02


def test_it_composes_with_balance_and_gptq(small: DDIMPipeline, pairs: PairStore) -> None:
    seen, traced = observe(small.unet, pairs, progress=False), trace(small)
    recipe = dataclasses.replace(RECIPE, balance=True, rounding="gptq", include="mid_block.*")
    plain, corrected = (
        quantize_observed(small, choice, seen, traced, pairs=pairs).unet
        for choice in (recipe, dataclasses.replace(recipe, bias_correction=True))
    )
    for (_, a), (_, b) in zip(quantized_layers(plain), quantized_layers(corrected), strict=True):
        assert torch.equal(a.weight_int8, b.weight_int8)
        assert torch.equal(a.weight_scale, b.weight_scale)
    median = (errors(small, corrected, pairs) / errors(small, plain, pairs)).median()
    assert float(median) < 0.5


def test_without_pairs_it_is_refused(small: DDIMPipeline, pairs: PairStore) -> None:
    seen = observe(small.unet, pairs, progress=False)
    with pytest.raises(OctavoError, match=r"bias_correction.* need the calibration pairs"):
        quantize_observed(small, dataclasses.replace(RECIPE, bias_correction=True), seen, trace(small))

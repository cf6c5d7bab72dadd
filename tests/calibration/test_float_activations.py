"""Layers that keep float activations: which, how many, and what becomes of them."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline

import octavo
from octavo.calibration import collect_pairs, float_activations, observe, rules_of, trace
from octavo.calibration.float_activations import ANY_LAYER, BF16, keep_float
from octavo.errors import OctavoError
from octavo.files import read_json, write_json
from octavo.quantization import QuantSpec, quantized_layers, walk
from octavo.runtimes.audit import audited

RECIPE = octavo.PTQ4DM(samples=16, steps=4, pairs_per_trajectory=4)


@pytest.fixture(scope="module")
def calibrated(pipeline: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    folder = tmp_path_factory.mktemp("pairs")
    pairs = collect_pairs(pipeline, RECIPE, folder, seed=0, batch_size=4, progress=False)
    return (
        rules_of(RECIPE, trace(pipeline)),
        pipeline.unet,
        pairs,
        observe(pipeline.unet, pairs, progress=False),
    )


@pytest.fixture(autouse=True)
def enough_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float_activations, "PASSES", 64)


def floats(rules: Any) -> list[str]:
    return [name for name, rule in rules.items() if rule.activations.is_float]


def kept(calibrated: tuple[Any, ...], share: float, **more: Any) -> tuple[Any, Any]:
    rules, *others = calibrated
    return keep_float(rules, share, *others, **more)


def test_a_coarse_layer_is_the_first(calibrated: tuple[Any, ...]) -> None:
    """Of 8 and 2 bits, the error is with the 2; and the share is never gone beyond."""
    rules, *others = calibrated
    coarse = next(name for name in rules if name.endswith("conv_shortcut"))
    worse = {**rules, coarse: replace(rules[coarse], activations=QuantSpec(2, symmetric=False))}
    new, found = keep_float(worse, 0.2, *others)
    assert coarse in floats(new) and found["layers"] == floats(new)
    assert 0 < found["cost"] <= 0.2 and found["error_over_bf16"][1] < found["error_over_bf16"][0] / 2
    assert {name: rule for name, rule in new.items() if name not in floats(new)} == {
        name: rule for name, rule in worse.items() if name not in floats(new)
    }
    assert not floats(keep_float(worse, ANY_LAYER / len(rules) / 2, *others)[0])


def test_it_ends_where_int8_errs_less_than_bf16(calibrated: tuple[Any, ...]) -> None:
    new, found = kept(calibrated, 1.0)
    before, behind = found["error_over_bf16"]
    assert 0 < len(floats(new)) < len(new) and behind <= 0.8 < before
    fewer = kept(calibrated, found["cost"] / 2)[1]
    assert set(fewer["layers"]) < set(new) and fewer["cost"] <= found["cost"] / 2


def test_of_many_layers_the_noisiest_are_measured(
    calibrated: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where four passes are not enough for two pairs a layer; the layer with 2 bits is among them."""
    rules, *others = calibrated
    coarse = next(name for name in rules if name.endswith("conv_shortcut"))
    worse = {**rules, coarse: replace(rules[coarse], activations=QuantSpec(2, symmetric=False))}
    monkeypatch.setattr(float_activations, "PASSES", 0.5)
    new, _ = keep_float(worse, 0.3, *others, state=tmp_path / "state.json")
    measured = set(read_json(tmp_path / "state.json"))
    assert len(measured) == 1 + 0.5 * 16 // 2 and coarse in measured and coarse in floats(new)


def test_the_network_is_left_as_it_was(calibrated: tuple[Any, ...]) -> None:
    network = calibrated[1]
    weights = copy.deepcopy(network.state_dict())
    kept(calibrated, 0.5)
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for _, layer in walk(network))


def test_what_was_measured_is_not_measured_again(calibrated: tuple[Any, ...], tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    whole = kept(calibrated, 0.3, state=state)
    measured = read_json(state)
    assert set(measured) == {BF16, *calibrated[0]}
    for name in list(measured)[10:]:  # as after a kill
        del measured[name]
    write_json(state, measured)
    assert kept(calibrated, 0.3, state=state) == whole and len(read_json(state)) == len(calibrated[0]) + 1
    write_json(state, {"of_another": [1.0]})
    with pytest.raises(OctavoError, match=r"state\.json: .*delete it"):
        kept(calibrated, 0.3, state=state)


def test_saved_loaded_and_executed(pipeline: DDIMPipeline, tmp_path: Path) -> None:
    """Such layers are in the folder, in the card, out of the audit; OpenVINO agrees as well as it does without."""
    recipe = replace(RECIPE, weights=7, balance=True, float_activations=0.3, time_embedding="weights")
    quantized = octavo.quantize(pipeline, recipe, batch_size=4, progress=False)
    layers = dict(quantized_layers(quantized.unet))
    names = {name for name, layer in layers.items() if layer.input_spec.is_float}
    by_choice = {name for name in names if "time" not in name}
    assert by_choice and len(names) > len(by_choice) and not names & set(audited(quantized.unet))
    assert not any(layers[name].input_multiplier is not None for name in names)
    quantized.save_pretrained(tmp_path / "saved")
    assert f"{len(names)} of these layers" in (tmp_path / "saved" / "README.md").read_text()
    loaded = octavo.load(str(tmp_path / "saved"))
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])
    with torch.no_grad():
        expected = quantized.unet(x, t).sample
        assert torch.equal(loaded.unet(x, t).sample, expected)
        fast = octavo.accelerate(loaded, precision="f32", batch_size=2)
        assert all(row.ok for row in octavo.audit(fast)) and len(octavo.audit(fast)) == len(layers) - len(
            names
        )
        first = fast.unet(x, t).sample
        assert float((first - expected).norm() / expected.norm()) < 0.02
        from_cache = octavo.accelerate(loaded, precision="f32", batch_size=2)
        assert torch.equal(from_cache.unet(x, t).sample, first)


@pytest.mark.parametrize("share", [-0.1, 1.5, True, "0.1", float("nan")])
def test_what_is_no_share_is_refused(share: Any) -> None:
    with pytest.raises(OctavoError, match=r"float_activations: .* is not a share from 0 to 1"):
        octavo.PTQ4DM(float_activations=share)

"""Layers that keep float activations: how they are measured, which, how many, and what becomes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from diffusers import DDIMPipeline
from torch import nn

import octavo
from octavo.calibration import activation_errors, collect_pairs, observe, rules_of, trace
from octavo.calibration.activation_errors import BF16, Errors
from octavo.calibration.float_activations import ANY_LAYER, keep_float
from octavo.calibration.observations import Observations
from octavo.errors import OctavoError
from octavo.files import read_json, write_json
from octavo.quantization import QuantSpec, quantized_layers, walk
from octavo.runtimes.audit import audited

RECIPE = octavo.PTQ4DM(samples=16, steps=4, pairs_per_trajectory=4)


@pytest.fixture(scope="module")
def calibrated(pipeline: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    folder = tmp_path_factory.mktemp("pairs")
    pairs = collect_pairs(pipeline, RECIPE, folder, seed=0, batch_size=4, progress=False)
    seen = observe(pipeline.unet, pairs, progress=False)
    return pipeline.unet, pairs, rules_of(RECIPE, trace(pipeline)), seen


@pytest.fixture(autouse=True)
def enough_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_errors, "PASSES", 64)


def measured(calibrated: tuple[Any, ...], **more: Any) -> Errors:
    return activation_errors.activation_errors(*calibrated, **more)


def with_a_coarse_layer(calibrated: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
    """A shortcut whose activations have 2 bits."""
    network, pairs, rules, seen = calibrated
    coarse = next(name for name in rules if name.endswith("conv_shortcut"))
    worse = {**rules, coarse: replace(rules[coarse], activations=QuantSpec(2, symmetric=False))}
    return coarse, (network, pairs, worse, seen)


def floats(rules: Any) -> list[str]:
    return [name for name, rule in rules.items() if rule.activations.is_float]


def test_the_error_is_that_of_a_quantizer_in_front_of_the_layer(calibrated: tuple[Any, ...]) -> None:
    """Each put there by hand, and bf16 as a network of rounded weights: the same numbers."""
    network, pairs, rules, seen = calibrated
    errors = measured(calibrated)
    rows = activation_errors._spread(pairs, 16)
    assert sum(map(len, rows)) == 16 and len(errors.bf16) == 16
    name = "mid_block.resnets.0.conv1"
    qparams = seen.layers[name].qparams(rules[name].activations, "mse")

    class Rounding(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fake_quantize_per_tensor_affine(
                x, float(qparams.scale), int(qparams.zero_point), 0, 255
            )

    by_hand = copy.deepcopy(network)
    block = by_hand.mid_block.resnets[0]
    block.conv1 = nn.Sequential(Rounding(), block.conv1)
    in_bf16 = copy.deepcopy(network)
    for _, layer in walk(in_bf16):
        layer.weight.data = layer.weight.data.bfloat16().float()
        layer.register_forward_pre_hook(lambda _, args: (args[0].bfloat16().float(),))
        layer.register_forward_hook(lambda _, args, y: y.bfloat16().float())
    with torch.inference_mode():
        for other, found in ((by_hand, errors.layers[name]), (in_bf16, errors.bf16)):
            expected = [
                e
                for at_once in rows
                for e in activation_errors._squares(
                    activation_errors._output(other, at_once) - activation_errors._output(network, at_once),
                    at_once,
                )
            ]
            assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4)
    conv, shortcut = errors.macs[name], errors.macs["time_embedding.linear_1"]
    assert abs(sum(errors.macs.values()) - 1) < 1e-9 and conv > shortcut > 0


def test_a_coarse_layer_is_the_first(calibrated: tuple[Any, ...]) -> None:
    """Of 8 and 2 bits, the error is with the 2; and the share is never gone beyond."""
    coarse, worse = with_a_coarse_layer(calibrated)
    errors, rules = measured(worse), worse[2]
    new, found = keep_float(rules, 0.2, errors)
    assert coarse in floats(new) and found["layers"] == floats(new)
    assert 0 < found["cost"] <= 0.2 and found["error_over_bf16"][1] < found["error_over_bf16"][0] / 2
    assert {name: rule for name, rule in new.items() if name not in floats(new)} == {
        name: rule for name, rule in rules.items() if name not in floats(new)
    }
    assert not floats(keep_float(rules, ANY_LAYER / len(rules) / 2, errors)[0])


def test_it_ends_where_int8_errs_less_than_bf16(calibrated: tuple[Any, ...]) -> None:
    errors, rules = measured(calibrated), calibrated[2]
    new, found = keep_float(rules, 1.0, errors)
    before, behind = found["error_over_bf16"]
    assert 0 < len(floats(new)) < len(new) and behind <= 0.8 < before
    fewer = keep_float(rules, found["cost"] / 2, errors)[1]
    assert set(fewer["layers"]) < set(new) and fewer["cost"] <= found["cost"] / 2


def test_of_many_layers_the_noisiest_are_measured(
    calibrated: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where four passes are not enough for two pairs a layer; the layer with 2 bits is among them."""
    coarse, worse = with_a_coarse_layer(calibrated)
    monkeypatch.setattr(activation_errors, "PASSES", 0.5)
    errors = measured(worse)
    assert len(errors.layers) == 0.5 * 16 // 2 and len(errors.bf16) == 2 and coarse in errors.layers
    assert coarse in floats(keep_float(worse[2], 0.3, errors)[0])


def test_the_network_is_left_as_it_was(calibrated: tuple[Any, ...]) -> None:
    network = calibrated[0]
    weights = copy.deepcopy(network.state_dict())
    measured(calibrated)
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for _, layer in walk(network))


def test_what_was_measured_is_not_measured_again(
    calibrated: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed run goes on to the same bits, and evaluates the rest alone; a damaged file is told."""
    evaluated: list[int] = []
    output: Callable[..., Any] = activation_errors._output
    monkeypatch.setattr(
        activation_errors,
        "_output",
        lambda network, rows: evaluated.append(len(rows)) or output(network, rows),
    )
    state = tmp_path / "state.json"
    whole = measured(calibrated, state=state)
    for_all, kept = len(evaluated), read_json(state)
    assert set(kept) == {BF16, *calibrated[2]}
    for name in list(kept)[10:]:  # as after a kill
        del kept[name]
    write_json(state, kept)
    evaluated.clear()
    again = measured(calibrated, state=state)
    assert torch.equal(again.bf16, whole.bf16) and len(evaluated) == for_all * (len(calibrated[2]) - 8) // (
        len(calibrated[2]) + 2
    )
    assert all(torch.equal(again.layers[name], errors) for name, errors in whole.layers.items())
    for damaged in ({"of_another": [1.0]}, {BF16: 1.0}, {BF16: [1.0]}, {BF16: ["1"] * 16}, []):
        write_json(state, damaged)
        with pytest.raises(OctavoError, match=r"state\.json: .*delete it"):
            measured(calibrated, state=state)


def test_a_layer_that_was_not_observed_is_told_as_ever(
    calibrated: tuple[Any, ...], pipeline: DDIMPipeline
) -> None:
    """It is not measured; that calibration missed it is said where its scale is wanted."""
    network, pairs, rules, seen = calibrated
    name = "mid_block.resnets.0.conv1"
    missed = Observations({other: found for other, found in seen.layers.items() if other != name})
    errors = activation_errors.activation_errors(network, pairs, rules, missed)
    assert name not in errors.layers and len(errors.layers) == len(rules) - 1
    with pytest.raises(OctavoError, match=rf"{name}: never ran during calibration"):
        octavo.calibration.quantize_observed(
            pipeline, replace(RECIPE, float_activations=0.1), missed, trace(pipeline), pairs=pairs
        )


def test_a_network_in_bf16_has_nothing_to_be_compared_with(
    make_pipeline: Callable[..., DDIMPipeline],
) -> None:
    """The share alone ends the choice, and what is remembered is JSON."""
    recipe = replace(RECIPE, float_activations=0.1)
    quantized = octavo.quantize(make_pipeline().to(torch.bfloat16), recipe, batch_size=4, progress=False)
    assert any(layer.input_spec.is_float for _, layer in quantized_layers(quantized.unet))
    zero = Errors({"a": torch.ones(2).double()}, torch.zeros(2).double(), {"a": 1.0})
    rules = {"a": next(iter(rules_of(RECIPE, trace(make_pipeline())).values()))}
    assert keep_float(rules, 1.0, zero)[1]["error_over_bf16"] == [None, None]


def test_saved_loaded_and_executed(
    pipeline: DDIMPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such layers are in the folder, told by the card and the audit; both engines agree as well as without."""
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
        for runtime in ("openvino", "onnx"):
            options: Any = {"runtime": runtime, "precision": "f32", "batch_size": 2}
            fast = octavo.accelerate(loaded, **options)
            rows = octavo.audit(fast)
            assert {row.layer for row in rows} == set(layers) - names and all(row.ok for row in rows)
            first = fast.unet(x, t).sample
            assert float((first - expected).norm() / expected.norm()) < 0.02
            from_cache = octavo.accelerate(loaded, **options)
            assert torch.equal(from_cache.unet(x, t).sample, first)
    code, out, _ = run(capsys, "audit", tmp_path / "saved", "--batch-size", 2, "--no-layers")
    assert code == 0 and f"{len(names)} more have integer weights alone" in out


@pytest.mark.parametrize("share", [-0.1, 1.5, True, "0.1", float("nan")])
def test_what_is_no_share_is_refused(share: Any) -> None:
    with pytest.raises(OctavoError, match=r"float_activations: .* is not a share from 0 to 1"):
        octavo.PTQ4DM(float_activations=share)

"""Layers that keep float activations: which, how many, and what becomes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from diffusers import DDIMPipeline

import octavo
from octavo.calibration import activation_errors, rules_of, steps, trace
from octavo.calibration.activation_errors import Errors
from octavo.calibration.float_activations import ANY_LAYER, keep_float
from octavo.calibration.observations import Observations
from octavo.calibration.rules import LayerRule
from octavo.calibration.steps import rules_with_floats
from octavo.errors import OctavoError
from octavo.quantization import QuantSpec, quantized_layers
from octavo.runtimes.audit import audited

RECIPE = octavo.PTQ4DM(samples=16, steps=4, pairs_per_trajectory=4)


@pytest.fixture(autouse=True)
def enough_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_errors, "PASSES", 64)


def measured(calibrated: tuple[Any, ...]) -> Errors:
    return activation_errors.activation_errors(*calibrated)


def floats(rules: Any) -> list[str]:
    return [name for name, rule in rules.items() if rule.activations.is_float]


def test_a_coarse_layer_is_the_first(coarse: tuple[str, tuple[Any, ...]]) -> None:
    """Of 8 and 2 bits, the error is with the 2; and the share is never gone beyond."""
    name, worse = coarse
    errors, rules = measured(worse), worse[2]
    new, found = keep_float(rules, 0.2, errors)
    assert name in floats(new) and found["layers"] == floats(new)
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


def test_bits_that_were_asked_for_are_kept(
    coarse: tuple[str, tuple[Any, ...]], pipeline: DDIMPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much such a layer errs; and where all are asked for, nothing is measured."""
    name, worse = coarse
    network, pairs, rules, seen = worse
    recipe = replace(RECIPE, float_activations=0.2, bits={name: (8, 2)})
    new, remembered = rules_with_floats(recipe, network, pairs, rules, seen, {})
    found = remembered["float_activations"]
    free = keep_float(rules, 0.2, measured(worse))[1]
    assert name not in floats(new) and name in free["layers"] and found["layers"]
    assert found["error_over_bf16"][0] == pytest.approx(free["error_over_bf16"][0], rel=1e-3)
    everything = replace(recipe, bits={"*": (8, 8)})
    monkeypatch.delattr(steps, "activation_errors")
    assert rules_with_floats(everything, network, pairs, rules, seen, {}) == (rules, {})


def test_what_was_not_measured_is_in_the_sum() -> None:
    """The estimate of b alone is above bf16: so a, though it is chosen, does not end the choice; c does not fit."""
    one = torch.ones(2).double()
    errors = Errors(
        {"a": 4 * one, "c": 0.1 * one}, one, {"a": 0.1, "b": 0.8, "c": 0.1}, {"b": 2 * one, "d": 0 * one}
    )
    rules = dict.fromkeys("abcd", LayerRule(QuantSpec(granularity="per_channel"), QuantSpec(8)))
    new, found = keep_float(rules, 0.3, errors)
    assert floats(new) == ["a", "c"] and found["measured"] == 2 and found["of_layers"] == 4
    assert found["error_over_bf16"] == [6.1, 2.0]
    assert floats(keep_float(rules, 0.3, replace(errors, estimated={}))[0]) == ["a"]


def test_costs_add_up_to_the_share() -> None:
    """Each layer costs its multiply-adds and a tenth of the average layer's: all together 1.1."""
    one = torch.ones(1).double()
    errors = Errors({"a": 3 * one, "b": 2 * one}, one / 100, {"a": 0.5, "b": 0.5})
    rules = dict.fromkeys("ab", LayerRule(QuantSpec(granularity="per_channel"), QuantSpec(8)))
    assert (
        floats(keep_float(rules, 0.55, errors)[0]) == ["a"]
        and keep_float(rules, 0.55, errors)[1]["cost"] == 0.55
    )
    assert not floats(keep_float(rules, 0.54, errors)[0])


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
    card = (tmp_path / "saved" / "README.md").read_text()
    assert f"| float activations | {len(names)} of these layers |" in card
    assert f"per tensor (float in {len(names)} of these layers), no training" in card
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
    counts = {
        "quantized_layers": len(layers),
        "float_activations": len(names),
        "audited": len(layers) - len(names),
    }
    exported = ("export", tmp_path / "saved", "--out", tmp_path / "ir", "--format", "openvino")
    for arguments in (("audit", tmp_path / "saved", "--batch-size", 2), exported):
        code, out, err = run(capsys, *arguments, "--json")
        assert code == 0, err
        assert counts.items() <= json.loads(out).items()
    assert counts.items() <= json.loads((tmp_path / "ir" / "export.json").read_text()).items()


@pytest.mark.parametrize("share", [-0.1, 1.5, True, "0.1", float("nan")])
def test_what_is_no_share_is_refused(share: Any) -> None:
    with pytest.raises(OctavoError, match=r"float_activations: .* is not a share from 0 to 1"):
        octavo.PTQ4DM(float_activations=share)

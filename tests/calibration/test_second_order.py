"""Second-order rounding of a whole network: better outputs, the same bits after a kill, bounded memory."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline

import octavo
from octavo.calibration import collect_pairs, second_order
from octavo.calibration.collect import PairStore
from octavo.calibration.evaluate import evaluations
from octavo.calibration.second_order import round_again
from octavo.errors import OctavoError
from octavo.quantization import moments, quantized_layers
from octavo.quantization.groups import divide, multiply
from octavo.quantization.moments import SecondMoment

RECIPE = octavo.PTQ4DM(weights=4, samples=64, steps=4, pairs_per_trajectory=2)


@pytest.fixture(scope="module")
def pairs(pipeline: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> PairStore:
    return collect_pairs(pipeline, RECIPE, tmp_path_factory.mktemp("pairs"), batch_size=4, progress=False)


@pytest.fixture(scope="module")
def coarse(pipeline: DDIMPipeline) -> DDIMPipeline:
    return octavo.quantize(pipeline, RECIPE, batch_size=4, progress=False)


def integers(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.weight_int8.clone() for name, layer in quantized_layers(network)}


def test_every_layer_is_no_worse_and_the_network_is_better(
    pipeline: DDIMPipeline, coarse: DDIMPipeline, pairs: PairStore
) -> None:
    unet = copy.deepcopy(coarse.unet)
    rows = round_again(unet, pipeline.unet, pairs, progress=False)
    assert [row.layer for row in rows] == [name for name, _ in quantized_layers(unet)]
    assert sum(row.after for row in rows) < 0.8 * sum(row.before for row in rows)
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        errors = [
            float((network(x, 400).sample - pipeline.unet(x, 400).sample).norm())
            for network in (unet, coarse.unet)
        ]
    assert errors[0] < 0.9 * errors[1]
    for (_, ours), (_, nearest) in zip(quantized_layers(unet), quantized_layers(coarse.unet), strict=True):
        assert torch.equal(ours.weight_scale, nearest.weight_scale)


def test_with_groups_it_is_no_worse_and_stays_within_them(pipeline: DDIMPipeline, pairs: PairStore) -> None:
    few = {"include": "mid_block.*", "samples": 4, "steps": 2}
    recipe = octavo.PTQ4DM(weights=4, group_size=32, balance=True, **few)  # type: ignore[arg-type]
    nearest = octavo.quantize(pipeline, recipe, batch_size=4, progress=False).unet
    assert any(layer.input_multiplier is not None for _, layer in quantized_layers(nearest))
    unet = copy.deepcopy(nearest)
    rows = round_again(unet, pipeline.unet, pairs, progress=False)
    assert sum(row.after for row in rows) < 0.8 * sum(row.before for row in rows)
    for (_, ours), (_, before) in zip(quantized_layers(unet), quantized_layers(nearest), strict=True):
        m = before.group_multiplier
        assert m is not None and torch.equal(ours.group_multiplier, m)
        assert not torch.equal(ours.weight_int8, before.weight_int8)
        stored = divide(ours.weight_int8, m, ours.weight_spec)
        assert int(stored.abs().max()) <= 7
        assert torch.equal(multiply(stored, m, ours.weight_spec), ours.weight_int8)


def test_a_killed_run_goes_on_to_the_same_bits(
    pipeline: DDIMPipeline,
    coarse: DDIMPipeline,
    pairs: PairStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(second_order, "MOMENT_BYTES", 2**21)
    whole = copy.deepcopy(coarse.unet)
    round_again(whole, pipeline.unet, pairs, progress=False)
    cut, rounded, state = copy.deepcopy(coarse.unet), [], tmp_path / "state.safetensors"
    original = second_order._round

    def killed(name, *args):  # type: ignore[no-untyped-def]
        rounded.append(name)
        if len(rounded) == 30:
            raise KeyboardInterrupt
        return original(name, *args)

    monkeypatch.setattr(second_order, "_round", killed)
    with pytest.raises(KeyboardInterrupt):
        round_again(cut, pipeline.unet, pairs, state=state, progress=False)
    assert state.is_file()
    again = copy.deepcopy(coarse.unet)
    before = len(rounded)
    rows = round_again(again, pipeline.unet, pairs, state=state, progress=False)
    assert len(rounded) - before < len(rows), "what was done is not done again"
    for name, value in integers(whole).items():
        assert torch.equal(integers(again)[name], value), name


def test_as_many_rows_as_are_wanted(
    coarse: DDIMPipeline, pairs: PairStore, pipeline: DDIMPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each batch of pairs is several evaluations, which share what is wanted of it."""
    assert evaluations(pairs) == 2 * len(pairs)
    taken = []

    class Counting(SecondMoment):
        def value(self) -> torch.Tensor:
            taken.append(self.rows)
            return super().value()

    monkeypatch.setattr(second_order, "SecondMoment", Counting)
    monkeypatch.setattr(moments, "LEAST_ROWS", 100)
    monkeypatch.setattr(moments, "ROWS_PER_COLUMN", 0)
    round_again(copy.deepcopy(coarse.unet), pipeline.unet, pairs, progress=False)
    assert max(taken) == -(-100 // evaluations(pairs)) * evaluations(pairs)


def test_passes_hold_what_fits(coarse: DDIMPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = dict(quantized_layers(coarse.unet))
    assert second_order._passes(layers) == [list(layers)]
    monkeypatch.setattr(second_order, "MOMENT_BYTES", 1)
    assert second_order._passes(layers) == [[name] for name in layers]


def test_the_recipe_asks_for_it(pipeline: DDIMPipeline, coarse: DDIMPipeline, tmp_path: Path) -> None:
    """octavo.quantize does the same, says so in the checkpoint, and ends with the same bits after a kill."""
    recipe = dataclasses.replace(RECIPE, rounding="gptq")
    ours = octavo.quantize(pipeline, recipe, batch_size=4, progress=False)
    again = octavo.quantize(pipeline, recipe, batch_size=4, progress=False, workdir=tmp_path)
    changed = [
        not torch.equal(value, integers(coarse.unet)[name]) for name, value in integers(ours.unet).items()
    ]
    assert all(changed)
    for name, value in integers(ours.unet).items():
        assert torch.equal(value, integers(again.unet)[name])
    ours.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved/unet/config.json").read_text())["quantization_config"]
    assert config["recipe"]["rounding"] == "gptq"
    assert 0 < config["calibration"]["gptq"]["median_error_over_nearest"] < 1
    assert config["calibration"]["gptq"]["diagonal_blocks"] == []


def test_an_unknown_rounding_is_refused() -> None:
    with pytest.raises(OctavoError, match="rounding: 'best' is not one of nearest, gptq"):
        octavo.PTQ4DM(rounding="best")


def test_an_evaluation_ends_with_the_last_layer_of_its_pass(
    pipeline: DDIMPipeline, coarse: DDIMPipeline, pairs: PairStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers behind are not evaluated, and the bits are those of whole evaluations."""
    monkeypatch.setattr(second_order, "MOMENT_BYTES", 2**20)
    found: list[dict[str, torch.Tensor]] = []
    runs = [0, 0]
    for i in (0, 1):
        if i:  # calls that are not counted end nothing
            monkeypatch.setattr(second_order, "Counter", lambda calls: {})
        unet = copy.deepcopy(coarse.unet)
        layers = dict(quantized_layers(unet))
        assert len(second_order._passes(layers)) > 2

        def count(module: torch.nn.Module, args: object, i: int = i) -> None:
            runs[i] += 1

        for layer in layers.values():
            layer.register_forward_pre_hook(count)
        round_again(unet, pipeline.unet, pairs, progress=False)
        found.append(integers(unet))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert runs[0] < 0.8 * runs[1]

"""What rounding one layer's activations does to the network's output: measured, estimated, and kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline
from torch import nn

import octavo
from octavo.calibration import activation_errors, collect_pairs, observe, rules_of, trace
from octavo.calibration.activation_errors import BF16, FORMAT, Errors
from octavo.calibration.collect import PairStore
from octavo.calibration.evaluate import rows_at_once
from octavo.calibration.rules import layer_rules
from octavo.diffusion import CalibrationPair, collate
from octavo.errors import OctavoError
from octavo.files import read_json, write_json
from octavo.quantization import walk

RECIPE = octavo.PTQ4DM(samples=16, steps=4, pairs_per_trajectory=4)


@pytest.fixture(autouse=True)
def enough_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_errors, "PASSES", 64)


def measured(calibrated: tuple[Any, ...], **more: Any) -> Errors:
    return activation_errors.activation_errors(*calibrated, **more)


def test_the_error_is_that_of_a_quantizer_in_front_of_the_layer(calibrated: tuple[Any, ...]) -> None:
    """Each put there by hand, and bf16 as a network of rounded weights: the same numbers, pair by pair."""
    network, pairs, rules, seen = calibrated
    errors = measured(calibrated)
    assert len(pairs) == 1 and len(errors.bf16) == 16
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
            expected = []
            for rows in rows_at_once(pairs.load(0)):
                call = collate(rows)
                difference = other(**call).sample - network(**call).sample
                expected += [float(of_row.double().square().sum()) for of_row in difference]
            assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4)
    conv, shortcut = errors.macs[name], errors.macs["time_embedding.linear_1"]
    assert abs(sum(errors.macs.values()) - 1) < 1e-9 and conv > shortcut > 0


def test_of_many_layers_the_noisiest_are_measured_and_the_others_estimated(
    calibrated: tuple[Any, ...], coarse: tuple[str, tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where four passes are not enough for two pairs a layer; the layer with 2 bits is among them.

    Measured ones are as measured among all; the sum over all layers is within a factor of two of that of all measured.
    """
    name, worse = coarse
    monkeypatch.setattr(activation_errors, "PASSES", 0.5)
    few = measured(worse)
    assert len(few.layers) == 0.5 * 16 // 2 and len(few.bf16) == 2 and name in few.layers
    assert set(few.estimated) == set(worse[2]) - set(few.layers)
    few = measured(calibrated)
    monkeypatch.setattr(activation_errors, "PASSES", len(calibrated[2]) / 8)
    every = measured(calibrated)
    assert not every.estimated and len(every.bf16) == 2
    assert all(torch.allclose(own, every.layers[name], rtol=1e-3) for name, own in few.layers.items())
    found = torch.stack([*few.layers.values(), *few.estimated.values()]).sum()
    true = torch.stack(list(every.layers.values())).sum()
    alone = torch.stack(list(few.layers.values())).sum()
    assert 0.5 < float(found / true) < 2 and abs(found - true) < abs(alone - true)


def test_what_is_in_front_of_a_layer_is_not_computed_again(
    calibrated: tuple[Any, ...], tmp_path: Path
) -> None:
    """And the errors are the same to the bit."""
    runs, found = [], []
    network = copy.deepcopy(calibrated[0])
    for state in (None, tmp_path / "state.json"):
        ran: list[int] = []
        for _, layer in walk(network):
            layer.forward = _counted(type(layer).forward.__get__(layer), ran)
        found.append(measured((network, *calibrated[1:]), state=state))
        runs.append(len(ran))
    assert runs[1] < 0.75 * runs[0]
    assert torch.equal(found[0].bf16, found[1].bf16)
    assert all(torch.equal(own, found[1].layers[name]) for name, own in found[0].layers.items())
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def _counted(forward: Callable[..., Any], ran: list[int]) -> Callable[..., Any]:
    def counted(*args: Any) -> Any:
        ran.append(0)
        return forward(*args)

    return counted


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
    errors = kept["errors"]
    assert set(errors) == {BF16, *calibrated[2]}
    for name in list(errors)[10:]:  # as after a kill
        del errors[name]
    write_json(state, kept)
    evaluated.clear()
    again = measured(calibrated, state=state)
    layers = len(calibrated[2])
    of_one = (for_all - 1) // (
        layers + 2
    )  # all of them, bf16 and the float network; one evaluation is watched
    assert torch.equal(again.bf16, whole.bf16) and len(evaluated) == 1 + of_one * (layers - 8)
    assert all(torch.equal(again.layers[name], errors) for name, errors in whole.layers.items())
    for damaged in ({"of_another": [1.0]}, {BF16: 1.0}, {BF16: [1.0]}, {BF16: ["1"] * 16}, [], None):
        write_json(state, {"format": FORMAT, "errors": damaged} if damaged != [] else damaged)
        with pytest.raises(OctavoError, match=r"state\.json: .*delete it"):
            measured(calibrated, state=state)
    before = {name: [9.0] * 16 for name in (BF16, *calibrated[2])}
    write_json(state, before)  # as kept of other pairs, before there was a format
    assert torch.equal(measured(calibrated, state=state).bf16, whole.bf16)


def one_layer_store(folder: Path, x: torch.Tensor) -> PairStore:
    """A batch of pairs that hand over a row of `x` [rows, features] each."""
    rows = frozenset({"sample"})
    pairs = [
        CalibrationPair({"sample": row[None], "timestep": torch.tensor(k)}, rows, 1, k, 0, 1)
        for k, row in enumerate(x)
    ]
    store = PairStore(folder, 1)
    store.save(0, pairs)
    return store


class Twice(nn.Module):
    """A layer that runs twice, the second time on a hundredth of what it read, and one that runs once."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.shared, self.once = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.once.load_state_dict(self.shared.state_dict())

    def forward(self, sample: Any, timestep: Any, return_dict: bool = True) -> tuple[torch.Tensor]:
        return (self.shared(sample) + self.shared(sample / 100) + self.once(sample),)


def test_what_a_layer_adds_is_summed_over_its_calls(tmp_path: Path) -> None:
    """Its own noise, too, is over all calls and rows: not that of the last, whose noise is larger than its signal."""
    network = Twice().eval()
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    pairs = one_layer_store(tmp_path, x)
    seen = observe(network, pairs, progress=False)
    rules = layer_rules(octavo.PTQ4DM(activations=4), ["shared", "once"], [])
    errors = activation_errors.activation_errors(network, pairs, rules, seen)
    assert errors.macs == {"shared": 2 / 3, "once": 1 / 3}
    quantizers = {
        name: activation_errors._Quantizer(
            rule.activations, seen.layers[name].qparams(rule.activations), None
        )
        for name, rule in rules.items()
    }
    read = {"shared": torch.cat([x, x / 100]), "once": x}
    batch = pairs.load(0)
    with torch.no_grad():
        found = activation_errors._own_noise(network, [batch[:4], batch[4:]], dict(walk(network)), quantizers)
        for name, values in read.items():
            weight = getattr(network, name).weight
            error = (quantizers[name](values, 2) - values) @ weight.T
            expected = float(error.square().sum() / (values @ weight.T).square().sum())
            assert found[name] == pytest.approx(expected, rel=1e-4)


def test_a_balanced_layer_is_rounded_behind_its_multiplier(tmp_path: Path) -> None:
    network = Twice().eval()
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    m = torch.tensor([0.5, 1.0, 2.0, 4.0])
    pairs = one_layer_store(tmp_path, x)
    rules = layer_rules(octavo.PTQ4DM(), ["once"], [])
    seen = observe(network, one_layer_store(tmp_path / "..", x * m), progress=False)
    errors = activation_errors.activation_errors(network, pairs, rules, seen, multipliers={"once": m})
    qparams = seen.layers["once"].qparams(rules["once"].activations)
    rounded = torch.fake_quantize_per_tensor_affine(
        x * m, float(qparams.scale), int(qparams.zero_point), 0, 255
    )
    expected = ((rounded / m - x) @ network.once.weight.T).detach().square().sum(1).double()
    assert torch.allclose(errors.layers["once"], expected, rtol=1e-2)


def test_a_learned_variance_is_left_out(dit: DiTPipeline, tmp_path: Path) -> None:
    """What is a hundred times as large in the half that no image shows changes no error."""
    inputs = {"class_labels": [1]}
    recipe = replace(RECIPE, samples=4, steps=2, pairs_per_trajectory=2)
    pairs = collect_pairs(dit, recipe, tmp_path, batch_size=2, inputs=inputs, progress=False)
    seen = observe(dit.transformer, pairs, progress=False)
    louder = copy.deepcopy(dit.transformer)
    last = louder.proj_out_2
    with torch.no_grad():
        channels = last.weight.view(-1, louder.config.out_channels, last.in_features)  # patches, channels
        channels[:, louder.config.in_channels :] *= 100
    rules = rules_of(recipe, trace(dit, inputs))
    found = [
        activation_errors.activation_errors(network, pairs, rules, seen)
        for network in (dit.transformer, louder)
    ]
    assert pairs.load(0)[0].num_rows == 2 and len(found[0].bf16) == 4  # guidance: two rows a pair
    assert torch.equal(found[0].bf16, found[1].bf16)
    assert all(torch.equal(own, found[1].layers[name]) for name, own in found[0].layers.items())


def test_what_float16_holds_stays_finite_in_bf16() -> None:
    layer = nn.Linear(2, 2, bias=False).half()
    layer.weight.data = torch.tensor([[1.0, 0.0], [0.0, -1.0]]).half()
    x = torch.tensor([[65504.0, 65440.0], [3.001, 1.0]]).half()
    with torch.no_grad(), activation_errors._in_bf16([layer]):
        y = layer(x)
    assert torch.equal(y, torch.tensor([[65504.0, -65504.0], [3.0, -1.0]]).half())


def test_a_network_that_is_left_within_bf16_is_as_it_was() -> None:
    layer = nn.Linear(3, 3)
    weight = layer.weight
    with pytest.raises(KeyboardInterrupt), activation_errors._in_bf16([layer]):
        layer.register_forward_pre_hook(lambda module, args: (_ for _ in ()).throw(KeyboardInterrupt))
        layer(torch.ones(1, 3))
    assert layer.weight is weight and "_kept" not in vars(layer)

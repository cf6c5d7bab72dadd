"""Scales by timestep on calibration pairs: found where ranges differ, used by the network and by GPTQ."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

import octavo
from octavo.calibration import LayerRule, observe, quantize_denoiser
from octavo.calibration.collect import PairStore
from octavo.calibration.evaluate import evaluate
from octavo.calibration.second_order import round_again
from octavo.calibration.timestep_scales import TimestepScales, summary, timestep_scales
from octavo.diffusion import CalibrationPair
from octavo.errors import OctavoError
from octavo.quantization import QuantSpec, dequantized, quantized_layers
from octavo.quantization.moments import SecondMoment

RULE = LayerRule(QuantSpec(8, granularity="per_channel", narrow=True), QuantSpec(4, symmetric=False))
RECIPE = octavo.PTQ4DM(activations=4, timestep_groups=2)
QUIET, LOUD = 100, 900


class Denoiser(nn.Module):
    """Multiplies its input by 1 or by 8, by the timestep; one layer reads that, and one its first row alone."""

    def __init__(self) -> None:
        super().__init__()
        self.steady, self.varied, self.shared = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True
    ) -> tuple[torch.Tensor]:
        loud = torch.where(timestep > 500, 8.0, 1.0).reshape(-1, 1)
        y = self.steady(sample) + self.varied(sample * loud)
        return (y + self.shared(sample[:1].expand(1, 6)),)


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Denoiser().eval()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PairStore:
    """40 quiet pairs and 40 loud ones, two batches of each image alternating."""
    store = PairStore(tmp_path_factory.mktemp("pairs"), 2)
    generator = torch.Generator().manual_seed(0)
    for batch in range(2):
        store.save(
            batch,
            [
                CalibrationPair(
                    {
                        "sample": torch.randn(1, 6, generator=generator),
                        "timestep": torch.tensor(LOUD if image % 2 else QUIET),
                    },
                    frozenset({"sample"}),
                    1,
                    image,
                    0,
                    1,
                )
                for image in range(40)
            ],
        )
    return store


def rules() -> dict[str, LayerRule]:
    return dict.fromkeys(("steady", "varied", "shared"), RULE)


def test_only_a_layer_whose_range_varies_has_scales_by_timestep(denoiser: Denoiser, pairs: PairStore) -> None:
    found = timestep_scales(denoiser, pairs, rules(), 2, progress=False)
    assert found.borders.tolist() == [(QUIET + LOUD) / 2]
    assert list(found.factors) == list(found.qparams) == ["varied"]
    assert float(found.factors["varied"][0] / found.factors["varied"][1]) == pytest.approx(8, rel=0.15)
    assert (found.groups_of("varied"), found.groups_of("steady")) == (2, 1)
    assert summary(found, 3)["layers"] == 1
    assert found.errors["varied"] < 0.7


def test_too_few_pairs_or_no_layer_that_gains_leave_one_scale(denoiser: Denoiser, pairs: PairStore) -> None:
    steady = {"steady": RULE, "shared": RULE}
    for found in (
        timestep_scales(denoiser, pairs, steady, 2, progress=False),
        timestep_scales(denoiser, PairStore(pairs.folder, 0), rules(), 2, progress=False),
    ):
        assert not found.factors and not found.qparams
        assert summary(found, 3) == {"groups": 1, "layers": 0, "of_layers": 3}


def test_behind_the_multipliers(denoiser: Denoiser, pairs: PairStore) -> None:
    plain = timestep_scales(denoiser, pairs, rules(), 2, progress=False)
    doubled = timestep_scales(
        denoiser, pairs, rules(), 2, multipliers={"varied": torch.full((6,), 2.0)}, progress=False
    )
    scales = [float(found.qparams["varied"].scale) for found in (plain, doubled)]
    assert scales[1] == 2 * scales[0]
    assert torch.equal(doubled.factors["varied"], plain.factors["varied"])


def test_same_arguments_same_bits_and_a_finished_search_is_kept(
    denoiser: Denoiser, pairs: PairStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def search(network: nn.Module) -> TimestepScales:
        return timestep_scales(network, pairs, rules(), 2, state=tmp_path / "s.safetensors", progress=False)

    first = search(denoiser)
    second = timestep_scales(copy.deepcopy(denoiser), pairs, rules(), 2, progress=False)
    monkeypatch.setattr("octavo.calibration.timestep_scales.Passes", None)
    kept = search(denoiser)
    for other in (second, kept):
        assert torch.equal(other.borders, first.borders) and other.errors == first.errors
        assert torch.equal(other.factors["varied"], first.factors["varied"])
        assert torch.equal(other.qparams["varied"].scale, first.qparams["varied"].scale)
        assert torch.equal(other.qparams["varied"].zero_point, first.qparams["varied"].zero_point)
    (tmp_path / "s.safetensors").write_bytes(b"damaged")
    with pytest.raises(OctavoError, match="delete it and start again"):
        search(denoiser)


def test_a_network_that_is_told_no_timestep_has_no_groups(tmp_path: Path) -> None:
    class Untold(nn.Linear):
        def forward(self, sample: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:  # type: ignore[override]
            return (super().forward(sample),)

    store = PairStore(tmp_path, 1)
    store.save(0, [CalibrationPair({"sample": torch.zeros(1, 2)}, frozenset({"sample"}), 1, 0, 0, 1)])
    with pytest.raises(OctavoError, match="timestep_groups: Untold is told no timestep"):
        timestep_scales(Untold(2, 2), store, {}, 2, progress=False)


def quantized(denoiser: Denoiser, pairs: PairStore, found: TimestepScales, gptq: bool = False) -> nn.Module:
    seen = observe(denoiser, pairs, progress=False)
    network = quantize_denoiser(denoiser, RECIPE, rules(), {}, seen, by_timestep=found)
    if gptq:
        round_again(network, denoiser, pairs, progress=False)
    return network


def error(network: nn.Module, reference: nn.Module, timesteps: torch.Tensor) -> float:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        a, b = (net(x, timesteps)[0] for net in (network, reference))
    return float((a - b).norm() / b.norm())


def test_a_network_is_nearer_to_its_original_where_it_is_quiet(denoiser: Denoiser, pairs: PairStore) -> None:
    found = timestep_scales(denoiser, pairs, rules(), 2, progress=False)
    plain, ours = (quantized(denoiser, pairs, scales) for scales in (TimestepScales(), found))
    assert [name for name, layer in quantized_layers(ours) if layer.timestep_factor is not None] == ["varied"]
    quiet, loud = torch.tensor(QUIET), torch.tensor(LOUD)
    assert error(ours, denoiser, quiet) < 0.6 * error(plain, denoiser, quiet)
    assert error(ours, denoiser, loud) < 1.1 * error(plain, denoiser, loud)
    mixed = torch.tensor([QUIET, LOUD]).repeat(32)
    assert error(ours, denoiser, mixed) < 1.1 * error(plain, denoiser, mixed)
    floats = dequantized(ours)
    assert floats.state_dict().keys() == denoiser.state_dict().keys()
    assert error(floats, denoiser, quiet) < 0.02


def test_gptq_rounds_by_what_each_group_reads(denoiser: Denoiser, pairs: PairStore) -> None:
    """At 3 bits of weights rounding matters: its own second moments make it better than nearest."""
    found = timestep_scales(denoiser, pairs, rules(), 2, progress=False)
    narrow = {
        name: dataclasses.replace(rule, weights=dataclasses.replace(rule.weights, bits=3))
        for name, rule in rules().items()
    }
    seen = observe(denoiser, pairs, progress=False)
    nearest = quantize_denoiser(denoiser, RECIPE, narrow, {}, seen, by_timestep=found)
    ours = copy.deepcopy(nearest)
    (row,) = [row for row in round_again(ours, denoiser, pairs, progress=False) if row.layer == "varied"]
    assert 0 < row.after < row.before
    moment = SecondMoment(ours.get_submodule("varied"), len(pairs))
    hook = ours.get_submodule("varied").register_forward_pre_hook(
        lambda module, args: moment.observe(args[0])
    )
    evaluate(ours, pairs)
    hook.remove()
    exact = torch.cat(
        [pair.args["sample"] * (8 if pair.args["timestep"] > 500 else 1) for batch in pairs for pair in batch]
    )
    expected = exact.T @ exact / len(exact)
    assert float((moment.value()[0] - expected).norm() / expected.norm()) < 0.1


def test_the_recipe_checks_its_number_of_groups() -> None:
    for groups in (0, 65, True, 2.0):
        with pytest.raises(OctavoError, match="timestep_groups"):
            octavo.PTQ4DM(timestep_groups=groups)  # type: ignore[arg-type]

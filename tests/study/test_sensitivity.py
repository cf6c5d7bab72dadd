"""Layers ranked by what they do to the images, and bits chosen by that, on a tiny random pipeline."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import octavo
from octavo.checkpoint import float32_bytes, tensor_bytes
from octavo.diffusion import find_denoiser
from octavo.errors import OctavoError
from octavo.evaluation.generate import generate
from octavo.evaluation.similarity import mean_squared_error
from octavo.quantization import quantized_layers, ranges
from octavo.study import mixed_precision, one_at_a_time, sensitivity
from octavo.study.bits_file import weights_name, with_bits, with_layer_bits, write_bits
from octavo.study.layer_time import LayerTime
from octavo.study.layer_variants import layer_variants, of_width, stored_bytes
from octavo.study.mixed_precision import Budget, choice_text, choose_bits, layer_bits, parse_budget
from octavo.study.one_at_a_time import OneAtATime
from octavo.study.ranking import ranking, ranking_text, spearman
from octavo.study.sensitivity import IMAGE_STREAM, SensitivityOptions, measured_sensitivity

RECIPE = octavo.PTQ4DM(samples=8, steps=4, include=("*conv*", "mid_block.*"), sub_pixel=True)
SUMS = 0.01
"""How much another order of float32 sums changes an end effect: a layer left float upsamples as the original does."""
ROUNDINGS = 0.1
"""... and of a network with 4-bit weights throughout, where last bits turn a rounding (0.036 seen without VNNI)."""
OPTIONS = SensitivityOptions(num_images=3, steps=3, batch_size=4)


@pytest.fixture(scope="module")
def coarse() -> Any:
    """Ranges are searched coarsely, which is quicker."""
    patch = pytest.MonkeyPatch()
    patch.setattr(ranges, "CANDIDATES", 5)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def folder(pipeline, coarse: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    """What a whole run leaves."""
    out = tmp_path_factory.mktemp("sensitivity")
    with measured_sensitivity(pipeline, out, RECIPE, OPTIONS, name="tiny", progress=False):
        pass
    return out


@pytest.fixture
def found(pipeline, folder: Path, coarse: None) -> Any:  # type: ignore[no-untyped-def]
    with measured_sensitivity(pipeline, folder, RECIPE, OPTIONS, name="tiny", progress=False) as measured:
        yield measured


def states(pipeline) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    return {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}


def test_an_end_effect_is_that_of_a_model_with_this_layer_alone(found, pipeline) -> None:  # type: ignore[no-untyped-def]
    layer = "mid_block.resnets.0.conv1"
    recipe = replace(RECIPE, include=(layer,), weights=4)
    alone = octavo.quantize(pipeline, recipe, batch_size=4, progress=False)
    images = [
        generate(one, 3, steps=3, seed=IMAGE_STREAM, batch_size=3, progress=False)
        for one in (alone, pipeline)
    ]
    (row,) = (row for row in found.results["layers"] if row["layer"] == layer)
    assert row["options"]["4"]["squared_errors"] == pytest.approx(
        mean_squared_error(images[0], images[1]).tolist(), rel=SUMS
    )
    assert min(row["options"]["4"]["squared_errors"]) > 0


def test_single_errors_are_of_the_same_inputs_and_both_networks(found) -> None:  # type: ignore[no-untyped-def]
    bench: OneAtATime = found.bench
    fresh = OneAtATime(found.pipeline, num_images=3, steps=3, seed=bench.seed, batch_size=4)
    errors = fresh.single_errors(
        found.variants[4]
    )  # the first thing it is asked: the reference must be float
    assert errors.tolist() == pytest.approx(found.results["all"]["4"]["single_errors"]) and errors.min() > 0
    by_hand = []
    for step in bench.trajectory:
        outputs = []
        for layers in ({}, found.variants[4]):
            with bench.exchanged(layers), torch.inference_mode():
                outputs.append(bench.network(**{**step.calls[0], "return_dict": False})[0].double())
        by_hand.append(float((outputs[0] - outputs[1]).square().mean()))
    assert errors.tolist() == pytest.approx(by_hand)
    assert fresh.single_errors({}).max() == 0


def test_a_layer_that_is_not_exchanged_changes_nothing(found) -> None:  # type: ignore[no-untyped-def]
    assert found.bench.end_effect({}).max() == 0
    assert not list(quantized_layers(found.bench.network))


def test_effects_at_single_steps(found) -> None:  # type: ignore[no-untyped-def]
    bench = found.bench
    each = [bench.end_effect_of_step(found.variants[8], t).mean() for t in bench.timesteps]
    assert min(each) > 0 and not list(quantized_layers(bench.network))
    assert [row["end"] for row in found.results["ranking"]["gains"]] == pytest.approx(each)
    with pytest.raises(OctavoError, match=r"never evaluates the network at 1\.5"):
        bench.end_effect_of_step(found.variants[8], 1.5)


def test_the_file_holds_the_ranking(found, folder: Path) -> None:  # type: ignore[no-untyped-def]
    stored = json.loads((folder / "sensitivity.json").read_text())
    assert stored == json.loads(json.dumps(found.results))
    rows = stored["ranking"]["rows"]
    ends = [row["options"]["8"]["end"]["value"] for row in rows]
    assert ends == sorted(ends, reverse=True)
    assert [row["options"]["8"]["rank_end"] for row in rows] == list(range(1, len(rows) + 1))
    for row in rows:
        for bits in ("8", "4"):
            layer = found.variants[int(bits)][row["layer"]]
            assert row["options"][bits]["bytes"] == stored_bytes(layer)
            assert row["options"][bits]["end"]["low"] <= row["options"][bits]["end"]["value"]
    additive = stored["ranking"]["additive"]["4"]
    assert additive["sum"]["value"] == pytest.approx(sum(row["options"]["4"]["end"]["value"] for row in rows))
    assert additive["ratio"] == pytest.approx(additive["all"]["value"] / additive["sum"]["value"])
    text = ranking_text(found.results, 3)
    assert rows[0]["layer"] in text and f"... {len(rows) - 3} more" in text and "rank correlation" in text


def test_a_layer_that_errs_where_errors_do_not_count_ranks_low() -> None:
    """Layer a errs a hundred times more than b, but at the last step, where a ten-thousandth arrives in the image."""
    by_layer = {"a": ([0.0, 100.0], 0.01), "b": ([1.0, 0.0], 2.0)}
    one = {"bytes": 1}
    measured = {
        "timesteps": [900.0, 0.0],
        "floor": [0.0, 0.0],
        "steps": {"900": [1.0, 1.0], "0": [0.01, 0.01]},
        "all": {"8": {"squared_errors": [2.02, 2.02], "single_errors": [1.0, 100.0]}},
        "layers": [
            {
                "layer": name,
                "float_bytes": 4,
                "options": {"8": {**one, "squared_errors": [end, end], "single_errors": single}},
            }
            for name, (single, end) in by_layer.items()
        ],
    }
    found = ranking(measured)
    b, a = found["rows"]
    assert (a["layer"], a["options"]["8"]["rank_single"], a["options"]["8"]["rank_end"]) == ("a", 1, 2)
    assert [row["gain"] for row in found["gains"]] == [1.0, 0.0001]
    assert a["options"]["8"]["by_steps"] == pytest.approx(0.01) and b["options"]["8"]["by_steps"] == 1
    assert (a["options"]["8"]["centre"], b["options"]["8"]["centre"]) == (0, 900)
    assert found["agree"]["8"] == {"single": -1.0, "by_steps": 1.0} and found["over_by_steps"][
        "8"
    ] == pytest.approx(1.5)
    assert found["additive"]["8"]["ratio"] == pytest.approx(2.02 / 2.01)
    text = ranking_text({"ranking": found, "all": {"8": {}}})
    assert "99 % of the single-evaluation error arises at t = 0, where 0.0001 of an error arrives" in text


def test_it_goes_on_after_the_last_layer_and_leaves_the_pipeline_as_it_was(  # type: ignore[no-untyped-def]
    pipeline, coarse: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, runs = states(pipeline), 0
    real = one_at_a_time.OneAtATime.end_effect

    def interrupted(self, layers, seed=None):  # type: ignore[no-untyped-def]
        nonlocal runs
        runs += 1
        if runs == 4:
            raise KeyboardInterrupt
        return real(self, layers, seed)

    def run() -> None:
        with measured_sensitivity(pipeline, tmp_path, RECIPE, OPTIONS, name="tiny", progress=False):
            pass

    monkeypatch.setattr(one_at_a_time.OneAtATime, "end_effect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(sensitivity, "layer_variants", _reads_only(sensitivity.layer_variants))
    run()
    first, whole = (json.loads((out / "sensitivity.json").read_text()) for out in (tmp_path, folder))
    assert first["layers"] == whole["layers"] and runs == 1 + 2 * len(first["layers"]) + 2
    after = states(pipeline)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not list(tmp_path.glob("work/pairs-*"))


def _reads_only(make: Any) -> Any:
    def checked(pipeline: Any, recipe: Any, widths: Any, folder: Path, **rest: Any) -> Any:
        assert len(list(folder.glob("w*.safetensors"))) == len(widths)
        return make(pipeline, recipe, widths, folder, **rest)

    return checked


@pytest.mark.parametrize("ratio", [0.35, 0.5, 0.8])
def test_a_size_budget_is_kept_on_disk(found, pipeline, tmp_path: Path, ratio: float) -> None:  # type: ignore[no-untyped-def]
    chosen = choose_bits(found, Budget("size", ratio))
    assert chosen["cost"]["model"] <= ratio and chosen["bound"] <= chosen["predicted"]
    path = tmp_path / "bits.json"
    write_bits(path, pipeline.unet, layer_bits(chosen), budget=chosen["budget"])
    recipe = with_bits(RECIPE, path, pipeline.unet)
    quantized = octavo.quantize(pipeline, recipe, batch_size=4, progress=False)
    _, denoiser = find_denoiser(quantized)
    assert tensor_bytes(denoiser) / float32_bytes(denoiser) == pytest.approx(
        chosen["cost"]["model"], rel=1e-6
    )
    bits = {name: layer.weight_spec.bits for name, layer in quantized_layers(denoiser)}
    assert bits == {name: one[0] for name, one in chosen["layers"].items() if one != "float"}
    images = [
        generate(one, 3, steps=3, seed=IMAGE_STREAM + 3, batch_size=3, progress=False)
        for one in (quantized, pipeline)
    ]
    assert chosen["measured"]["chosen"]["value"] == pytest.approx(
        float(np.mean(mean_squared_error(images[0], images[1]))), rel=ROUNDINGS
    )
    assert "by single-evaluation error" in choice_text(chosen)


def test_a_budget_that_cannot_be_kept_says_what_can(found) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(OctavoError, match=r"size=0.01 cannot be reached; this model goes from 0\.\d+ to 1$"):
        choose_bits(found, Budget("size", 0.01))
    with pytest.raises(OctavoError, match=r"size=1\.5 is kept by the float network"):
        choose_bits(found, Budget("size", 1.5))


def test_a_latency_budget_gives_time_to_the_layers_that_matter(
    found, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    macs = dict.fromkeys((row["layer"] for row in found.results["layers"]), 10)
    monkeypatch.setattr(mixed_precision, "layer_time", lambda *_: LayerTime(10.0, 20.0, macs))
    monkeypatch.setattr(
        mixed_precision, "_timed", lambda *_: {"measured": 1.2, "measured_quartiles": [1.1, 1.3]}
    )
    budget = 1 + 3.5 / len(macs)  # three layers in float
    chosen = choose_bits(found, Budget("latency", budget))
    worst = [row["layer"] for row in found.results["ranking"]["rows"][:3]]
    assert [name for name, bits in chosen["layers"].items() if bits == "float"] == [
        name for name in macs if name in worst
    ]
    assert chosen["cost"]["model"] == pytest.approx(1 + 3 / len(macs))
    assert "1.200 measured (1.100 to 1.300)" in choice_text(chosen)
    with pytest.raises(OctavoError, match=r"latency=0\.9 cannot be reached; this model goes from 1 to 2"):
        choose_bits(found, Budget("latency", 0.9))
    monkeypatch.setattr(mixed_precision, "layer_time", lambda *_: LayerTime(10.0, 9.0, macs))
    with pytest.raises(OctavoError, match="there is nothing to choose"):
        choose_bits(found, Budget("latency", 1.1))


@pytest.mark.parametrize("text", ["size", "size=", "size=-1", "size=nan", "speed=2", "latency=fast", "0.2"])
def test_what_is_no_budget_is_told(text: str) -> None:
    with pytest.raises(OctavoError, match="is not of the form size="):
        parse_budget(text)


def test_bits_are_of_one_model(make_pipeline, pipeline, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path, other = tmp_path / "bits.json", make_pipeline(seed=1)
    write_bits(path, pipeline.unet, {"mid_block.resnets.0.conv1": (4, 8)})
    assert weights_name(pipeline.unet) != weights_name(other.unet)
    with pytest.raises(OctavoError, match="was made for another model"):
        with_bits(RECIPE, path, other.unet)
    write_bits(path, pipeline.unet, {"mid_block.resnets.0.conv1": (4, 32)})  # float activations
    assert dict(with_bits(RECIPE, path, pipeline.unet).bits) == {"mid_block.resnets.0.conv1": (4, 32)}
    layers = [
        f'{{"format": 1, "layers": {{"a": {bits}}}}}' for bits in ("[9, 8]", "[32, 8]", "[8, 16]", "[8]")
    ]
    for wrong in ('{"format": 1}', "[]", *layers):
        path.write_text(wrong)
        with pytest.raises(OctavoError, match=r"bits\.json: "):
            with_bits(RECIPE, path, pipeline.unet)


def test_a_width_that_is_too_wide_for_groups_has_none() -> None:
    recipe = octavo.PTQ4DM(weights=4, group_size=32)
    assert [of_width(recipe, bits).group_size for bits in (8, 4, 2)] == [None, 32, 32]


def test_variants_are_single_layers_whatever_else_the_recipe_does(  # type: ignore[no-untyped-def]
    pipeline, tmp_path: Path
) -> None:
    plain = octavo.PTQ4DM(samples=2, steps=2)
    more = replace(plain, output_correction=True, network_output=True)
    made = [
        layer_variants(pipeline, recipe, [8], tmp_path / str(k), progress=False)[8]
        for k, recipe in enumerate((plain, more))
    ]
    assert list(made[0]) == list(made[1])
    for name, layer in made[0].items():
        assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), made[1][name].buffers(), strict=True))


def test_the_files_bits_win_over_those_of_the_recipe() -> None:
    recipe = with_layer_bits(octavo.PTQ4DM(bits={"a": (5, 8), "*": (6, 8)}), {"a": (4, 8)})
    assert list(recipe.bits.items()) == [("*", (6, 8)), ("a", (4, 8))]  # the last match wins


def test_what_does_not_fit_is_told(quantized, pipeline, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with (
        pytest.raises(OctavoError, match="quantized already"),
        measured_sensitivity(quantized, tmp_path, RECIPE),
    ):
        pass
    with pytest.raises(OctavoError, match="at least 2"):
        SensitivityOptions(num_images=1)
    with pytest.raises(OctavoError, match="weight_bits"):
        SensitivityOptions(weight_bits=(9,))


def test_rank_correlation_takes_ties() -> None:
    assert spearman(np.array([1.0, 1, 2]), np.array([3.0, 3, 9])) == 1
    assert spearman(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == -1
    assert np.isnan(spearman(np.ones(3), np.arange(3.0)))

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor

import octavo
from octavo.calibration import RECIPES, evaluate, quantize_observed, trace
from octavo.calibration.observations import Observations
from octavo.calibration.rules import attention_rules, layer_rules
from octavo.errors import OctavoError
from octavo.quantization import HistogramObserver, QuantSpec, attention_calls, quantized_products
from octavo.quantization.attention_calls import product_name

OWNERS = [
    "down_blocks.1.attentions.0",
    "mid_block.attentions.0",
]
QUICK = {"samples": 2, "steps": 2, "metric": "minmax", "attention_matmuls": True}


def products(pipeline: DDIMPipeline) -> dict[str, torch.Tensor]:
    return {
        f"{product_name(name)}.{side}": getattr(product, f"{side}_scale")
        for name, product in quantized_products(pipeline.unet)
        for side in ("left", "right")
    }


def test_every_attention_that_ran_is_quantized(pipeline: DDIMPipeline, attentive: DDIMPipeline) -> None:
    assert sorted(trace(pipeline).attention) == OWNERS
    names = {name.rpartition(".")[0] for name in products(attentive)}
    assert names == {f"{owner}.{product}" for owner in OWNERS for product in ("qk", "pv")}
    assert not list(quantized_products(pipeline.unet)), "the original is left as it was"


def test_no_named_recipe_asks_for_it() -> None:
    assert not any(octavo.named_recipe(name).attention_matmuls for name in RECIPES)
    with pytest.raises(OctavoError, match="attention_matmuls: 1 is neither"):
        octavo.PTQ4DM(attention_matmuls=1)  # type: ignore[arg-type]


def test_scales_are_those_of_what_the_pairs_hand_to_attention(
    pipeline: DDIMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranges of the very tensors that torch's function is given; a killed run ends with the same ones."""

    class Killed(BaseException):
        pass

    recipe = octavo.PTQ4DM(**{**QUICK, "samples": 8, "pairs_per_trajectory": 1})
    seen: dict[str, float] = {}
    calls, real = 0, evaluate.collate

    def keeps(owner: str, *operands: torch.Tensor) -> None:
        for operand, x in zip(("query", "key", "value"), operands, strict=True):
            name = f"{owner}.{operand}"
            seen[name] = max(seen.get(name, 0.0), float(x.abs().max()))

    def dies(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 4:  # two batches are observed; then, on the second batch, attention
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(evaluate, "collate", dies)
    with pytest.raises(Killed):
        octavo.quantize(pipeline, recipe, batch_size=4, workdir=tmp_path, progress=False)
    quantized = octavo.quantize(pipeline, recipe, batch_size=4, workdir=tmp_path, progress=False)
    assert calls == 5, "only the batch that was killed is observed again"
    with attention_calls(
        pipeline.unet, keeps
    ):  # among them whole trajectories, not only what is caught of them
        whole = octavo.quantize(pipeline, recipe, batch_size=4, progress=False)
    assert products(quantized) == products(whole)
    for name in OWNERS:
        scales = {key: float(value) for key, value in products(whole).items() if key.startswith(f"{name}.")}
        assert scales[f"{name}.pv.left"] == pytest.approx(1 / 127)
        for operand, side, last in (
            ("query", "qk.left", 127),
            ("key", "qk.right", 63),
            ("value", "pv.right", 127),
        ):
            assert scales[f"{name}.{side}"] == pytest.approx(seen[f"{name}.{operand}"] / last, rel=0.2)


def test_patterns_know_an_attention_by_its_module() -> None:
    recipe = octavo.PTQ4DM(
        attention_matmuls=True, exclude=("mid.attn",), bits={"up.attn": (8, 5)}, activations=6
    )
    rules = attention_rules(recipe, ["down.attn", "mid.attn", "up.attn"])
    assert list(rules) == ["down.attn", "up.attn"]
    assert rules["down.attn"].query == QuantSpec(6) and rules["up.attn"].value == QuantSpec(5)
    floats = replace(recipe, bits={"*.attn": (8, 32), "up.attn": (8, 5)})
    assert list(attention_rules(floats, ["down.attn", "mid.attn", "up.attn"])) == ["up.attn"]
    layers = ["mid.attn.to_q"]
    assert list(layer_rules(recipe, layers, [], ["down.attn", "mid.attn", "up.attn"])) == layers
    with pytest.raises(OctavoError, match=r"pattern 'mid\.attn' matches none"):
        layer_rules(octavo.PTQ4DM(exclude=("mid.attn",)), layers, [], ["mid.attn"])


@pytest.mark.parametrize(
    ("recipe", "attention", "told"),
    [
        ({}, [], "calls no torch scaled_dot_product_attention"),
        ({"exclude": "*attn"}, ["a.attn"], "leave no attention"),
        ({"bits": {"*attn": (8, 32)}}, ["a.attn"], "include, exclude and bits leave no attention"),
        ({"exclude": "a.attn.inner"}, ["a.attn", "a.attn.inner"], "runs within a.attn; exclude both"),
    ],
)
def test_what_cannot_be_is_told(recipe: dict[str, object], attention: list[str], told: str) -> None:
    assert attention_rules(octavo.PTQ4DM(), attention) == {}
    with pytest.raises(OctavoError, match=told):
        attention_rules(octavo.PTQ4DM(attention_matmuls=True, **recipe), attention)  # type: ignore[arg-type]


def test_an_attention_made_of_other_functions_is_told_before_anything_is_collected(
    make_pipeline, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    other = make_pipeline()
    for module in other.unet.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())
    with pytest.raises(OctavoError, match="attention_matmuls: this network calls no"):
        octavo.quantize(other, octavo.PTQ4DM(**QUICK), workdir=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


class Rare(torch.nn.Module):
    """Attends to what it is given only where the network is told so."""

    def __init__(self) -> None:
        super().__init__()
        self.attends = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x) if self.attends else x


def test_an_attention_that_the_first_call_does_not_reach_stays_in_float(make_pipeline) -> None:  # type: ignore[no-untyped-def]
    one = make_pipeline()
    one.unet.conv_act = Rare()
    quantized = octavo.quantize(one, octavo.PTQ4DM(**QUICK), progress=False)
    assert len(products(quantized)) == 4 * len(OWNERS)
    assert not hasattr(quantized.unet.conv_act, "octavo_attention")


def test_an_attention_that_calibration_never_reaches_is_told(
    make_pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    one = make_pipeline()
    one.unet.conv_act = Rare()
    one.unet.conv_act.attends = True
    real = octavo.calibration.quantize.collect_pairs

    def then_leaves_it_out(*args: object, **kwargs: object) -> object:
        pairs = real(*args, **kwargs)  # type: ignore[arg-type]
        one.unet.conv_act.attends = False
        return pairs

    monkeypatch.setattr("octavo.calibration.quantize.collect_pairs", then_leaves_it_out)
    with pytest.raises(OctavoError, match="conv_act: its attention never ran during calibration; exclude it"):
        octavo.quantize(one, octavo.PTQ4DM(**QUICK), progress=False)


def test_experiments_need_the_pairs_again(pipeline: DDIMPipeline) -> None:
    seen = Observations({"x": HistogramObserver()})
    with pytest.raises(OctavoError, match=r"pairs: .*attention_matmuls"):
        quantize_observed(pipeline, octavo.PTQ4DM(**QUICK), seen, trace(pipeline))

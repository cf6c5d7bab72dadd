from __future__ import annotations

import json

import pytest

from octavo.calibration import PTQ4DM, RECIPES, named_recipe
from octavo.diffusion import NDTC
from octavo.errors import OctavoError
from octavo.quantization import QuantSpec


def test_defaults_are_the_papers_w8a8_with_l_2_4() -> None:
    recipe = PTQ4DM()
    assert (recipe.weights, recipe.activations, recipe.metric) == (8, 8, "mse")
    assert recipe.distribution == NDTC(mean=0.4, std=0.5)
    assert recipe.weight_spec().granularity == "per_channel" and recipe.weight_spec().symmetric
    assert recipe.activation_spec().qmax == 255
    assert PTQ4DM(symmetric=True).activation_spec().qmin == -128


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_groups_are_for_weights_of_at_most_4_bits(bits: int) -> None:
    recipe = PTQ4DM(weights=8, group_size=32)
    assert recipe.weight_spec().granularity == "per_channel"
    assert recipe.weight_spec(bits) == QuantSpec(bits, True, "per_group", narrow=True, group_size=32)
    assert PTQ4DM(weights=bits).weight_spec().group_size is None
    assert recipe.to_dict()["group_size"] == 32


def test_to_dict_is_json() -> None:
    recipe = PTQ4DM(bits={"*.to_q": (4, 8)}, timesteps=NDTC(std="sqrt"), exclude="a.*")
    assert json.loads(json.dumps(recipe.to_dict()))["timesteps"]["std"] == "sqrt"
    assert recipe.exclude == ("a.*",)


def test_biases_are_corrected_where_the_recipe_says_so() -> None:
    assert PTQ4DM().to_dict()["bias_correction"] is False
    assert PTQ4DM(bias_correction=True).to_dict()["bias_correction"] is True


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weights": 9}, "weights"),
        ({"activations": 1}, "activations"),
        ({"samples": 1025}, "samples"),
        ({"pairs_per_trajectory": 0}, "pairs_per_trajectory"),
        ({"steps": 0}, "steps"),
        ({"steps": 10.0}, "steps"),
        ({"metric": "l3"}, "metric"),
        ({"group_size": 1}, "group_size"),
        ({"group_size": 64.0}, "group_size"),
        ({"group_size": True}, "group_size"),
        ({"rounding": "up"}, "rounding"),
        ({"timesteps": "normal"}, "timesteps"),
        ({"bits": {"*": (8,)}}, "bits"),
        ({"bits": {"*": (8, 9)}}, "bits"),
        ({"bits": {"*": (8, 16)}}, r"bits.*: 16 is not a whole number from 2 to 8, nor 32 \(float\)$"),
        ({"bits": {"*": (32, 8)}}, r"bits.*: 32 is not a whole number from 2 to 8$"),
        ({"bits": {"*": 8}}, "bits"),
        ({"bits": 8}, "bits"),
        ({"include": 5}, "include"),
        ({"timesteps": 5}, "timesteps"),
        ({"symmetric": "no"}, "symmetric"),
        ({"bias_correction": 1}, "bias_correction"),
        ({"first_and_last": "int"}, "first_and_last"),
        ({"absorb": True}, "absorb: makes balancing's multiplication; give balance"),
        ({"pair_limit": True, "weights": 4}, "pair_limit: only 8-bit weights can overflow, and none are"),
    ],
)
def test_bad_values_are_named(change: dict[str, object], named: str) -> None:
    with pytest.raises(OctavoError, match=named):
        PTQ4DM(**change)  # type: ignore[arg-type]


def test_recipes_by_name_are_the_paper_and_what_is_added_to_it() -> None:
    assert named_recipe("ptq4dm") == PTQ4DM()
    best = named_recipe("best", samples=64, weights=6)
    assert (best.rounding, best.balance, best.samples, best.weights) == ("gptq", True, 64, 6)
    assert named_recipe("w4a8").weights == 4
    assert set(RECIPES) == {"ptq4dm", "best", "w4a8"}
    with pytest.raises(OctavoError, match="recipe: 'worst' is not one of ptq4dm, best, w4a8"):
        named_recipe("worst")

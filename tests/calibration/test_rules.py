from __future__ import annotations

from dataclasses import replace

import pytest

from octavo.calibration import PTQ4DM
from octavo.calibration.rules import layer_rules
from octavo.calibration.tracing import edge_layers
from octavo.errors import OctavoError
from octavo.quantization import FLOAT, QuantSpec

LAYERS = ["time.linear", "conv_in", "mid.to_q", "mid.to_k", "conv_out"]
EDGES = ["conv_in", "conv_out"]


def test_edges_stay_float_unless_asked() -> None:
    assert list(layer_rules(PTQ4DM(), LAYERS, EDGES)) == ["time.linear", "mid.to_q", "mid.to_k"]
    assert list(layer_rules(PTQ4DM(first_and_last="quantized"), LAYERS, EDGES)) == LAYERS


def test_include_exclude_and_bits_by_pattern() -> None:
    recipe = PTQ4DM(include=("mid.*",), exclude=("*.to_k",), bits={"mid.*": (6, 6), "*.to_q": (4, 8)})
    rules = layer_rules(recipe, LAYERS, EDGES)
    assert list(rules) == ["mid.to_q"]
    assert (rules["mid.to_q"].weights.bits, rules["mid.to_q"].activations.bits) == (4, 8)


def test_groups_apply_where_a_pattern_leaves_at_most_4_bits() -> None:
    recipe = PTQ4DM(weights=4, group_size=16, bits={"mid.*": (5, 8), "*.to_k": (3, 8)})
    rules = layer_rules(recipe, LAYERS, EDGES)
    sizes = {name: (rule.weights.granularity, rule.weights.group_size) for name, rule in rules.items()}
    assert sizes == {
        "time.linear": ("per_group", 16),
        "mid.to_q": ("per_channel", None),
        "mid.to_k": ("per_group", 16),
    }


def test_groups_that_no_layer_is_narrow_enough_for_are_told() -> None:
    recipe = PTQ4DM(weights=8, group_size=16)
    with pytest.raises(OctavoError, match=r"^group_size: no layer has weights of at most 4 bits; give 4-bit"):
        layer_rules(recipe, LAYERS, EDGES)
    assert layer_rules(PTQ4DM(group_size=16, bits={"*.to_q": (4, 8)}), LAYERS, EDGES)


@pytest.mark.parametrize(
    "change", [{"exclude": ("nothing.*",)}, {"bits": {"nothing": (4, 4)}}, {"exclude": ("*",)}]
)
def test_a_pattern_that_does_nothing_or_everything_is_told(change: dict[str, object]) -> None:
    with pytest.raises(OctavoError, match=r"pattern|no layer"):
        layer_rules(PTQ4DM(**change), LAYERS, EDGES)  # type: ignore[arg-type]


def test_edges_are_the_first_to_read_the_image_and_the_last_that_have_positions() -> None:
    trace = [
        ("time.linear", False, False),
        ("text_proj", True, False),
        ("conv_in", True, True),
        ("mid.to_q", True, True),
        ("proj", False, True),
        ("conv_out", True, True),
    ]
    assert edge_layers(trace) == tuple(EDGES)


def test_a_pair_limit_is_for_8_bit_weights_of_layers_that_read_integers() -> None:
    """An integer kernel alone adds products in 16 bits; also where a rule's activations become float later."""
    recipe = PTQ4DM(pair_limit=True, time_embedding="weights", bits={"conv*": (7, 8)})
    rules = layer_rules(recipe, ["time", "conv1", "linear"], [], timestep_layers=["time"])
    assert {name: rule.weights.pair_limit for name, rule in rules.items()} == {
        "time": False,
        "conv1": False,
        "linear": True,
    }
    floated = replace(rules["linear"], activations=QuantSpec(FLOAT))
    assert not floated.weights.pair_limit and floated.weights.bits == 8

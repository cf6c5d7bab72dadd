"""Groups of timesteps: the group of each row, and layers that quantize by its scale."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from octavo.errors import OctavoError
from octavo.quantization import (
    QParams,
    QuantLayer,
    QuantSpec,
    TimestepGroups,
    fake_quantize,
    qparams_from_range,
    quantize_layer,
    round_nearest,
)
from octavo.quantization.moments import SecondMoment

WEIGHTS = QuantSpec(8, granularity="per_channel", narrow=True)
INPUTS = QuantSpec(6, symmetric=False)
FACTORS = torch.tensor([1.0, 4.0, 0.5])
LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 4, 6)),
    "conv": (lambda: nn.Conv2d(6, 5, 3, padding=1), (3, 6, 7, 7)),
    "conv1d": (lambda: nn.Conv1d(6, 5, 3, padding=1), (3, 6, 7)),
}


def grouped_layer(kind: str, balanced: bool) -> tuple[QuantLayer, TimestepGroups, torch.Tensor]:
    make, shape = LAYERS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = make()
        x = torch.randn(shape)
    m = torch.linspace(0.5, 2, 6) if balanced else None
    weight, qparams = round_nearest(layer.weight, WEIGHTS, "minmax")
    new = quantize_layer(layer, WEIGHTS, INPUTS, weight, qparams, qparams_from_range(INPUTS, -2.0, 3.0), m)
    groups = TimestepGroups(torch.tensor([10.0, 500.0]))
    new.timestep_factor, new.current_group = FACTORS.clone(), groups.current
    return new, groups, x


def test_a_group_begins_at_its_border() -> None:
    groups = TimestepGroups(torch.tensor([10.0, 500.0]))
    assert groups.index(torch.tensor([0.0, 9.9, 10, 499.9, 500, 2000])).tolist() == [0, 0, 1, 1, 2, 2]
    assert groups.index(torch.tensor(10)).tolist() == [1]
    assert groups.to(torch.bfloat16).borders.dtype == torch.float32
    with pytest.raises(OctavoError, match="borders"):
        TimestepGroups(torch.zeros(0))


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_each_row_is_quantized_by_the_scale_of_its_group(kind: str, balanced: bool) -> None:
    """Against a layer of one scale, whose scale is that of the row's group."""
    layer, groups, x = grouped_layer(kind, balanced)
    groups.enter(torch.tensor([3, 700, 10]))
    y = layer(x)
    for row, group in enumerate((0, 2, 1)):
        one = copy.deepcopy(layer)
        one.timestep_factor = None
        one.input_scale /= FACTORS[group]
        torch.testing.assert_close(y[row : row + 1], one(x[row : row + 1]), rtol=1e-5, atol=1e-5)
        groups.enter(torch.tensor([3.0, 10.0, 700.0])[group])
        torch.testing.assert_close(layer(x)[row], y[row])
    assert "timestep_groups=3" in repr(layer)


def test_second_moments_are_of_inputs_quantized_by_their_own_scale() -> None:
    layer, groups, x = grouped_layer("linear", balanced=False)
    moment = SecondMoment(layer, batches=1)
    groups.enter(torch.tensor([3, 700, 10]))
    moment.observe(x)
    rows = torch.cat(
        [
            fake_quantize(row, QParams(layer.input_scale / FACTORS[g], layer.input_zero_point), INPUTS)
            for row, g in zip(x, (0, 2, 1), strict=True)
        ]
    )
    torch.testing.assert_close(moment.value()[0], rows.T @ rows / len(rows))


def test_outside_of_its_network_it_has_no_scale() -> None:
    layer, groups, x = grouped_layer("linear", balanced=False)
    with pytest.raises(OctavoError, match="call its network"):
        layer(x)
    groups.enter(torch.tensor(3))
    layer(x)
    groups.leave()
    with pytest.raises(OctavoError, match="call its network"):
        layer(x)
    layer.current_group = None
    with pytest.raises(OctavoError, match="call its network"):
        layer(x)


def test_a_copy_has_a_group_of_its_own_which_its_layers_share() -> None:
    layer, groups, x = grouped_layer("linear", balanced=False)
    network = nn.ModuleDict({"layer": layer, "groups": groups})
    groups.enter(torch.tensor(700))
    other = copy.deepcopy(network)
    assert other["layer"].current_group is other["groups"].current is not groups.current
    other["groups"].enter(torch.tensor(3))
    assert not torch.equal(other["layer"](x), layer(x))

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from octavo.errors import OctavoError
from octavo.evaluation.activation_ranges import (
    QUANTILES,
    ActivationRange,
    InputRange,
    activation_ranges,
    layers_worth_showing,
)
from octavo.evaluation.trajectory import trajectory

LAYER = "mid_block.resnets.0.conv1"


def test_ranges_are_of_the_float_inputs_and_shares_of_saturation(pipeline, quantized) -> None:  # type: ignore[no-untyped-def]
    steps = trajectory(pipeline, num_images=2, steps=3)
    (found,) = activation_ranges(quantized.unet, pipeline.unet, steps, [LAYER])
    inputs: list[torch.Tensor] = []
    hook = pipeline.unet.get_submodule(LAYER).register_forward_pre_hook(
        lambda m, args: inputs.append(args[0])
    )
    with torch.no_grad():
        for step in steps:
            pipeline.unet(**step.calls[0])
    hook.remove()
    layer = quantized.unet.get_submodule(LAYER)
    for i, x in enumerate(inputs):
        values = x.flatten().double().numpy()
        assert (found.minimum[i], found.maximum[i]) == (values.min(), values.max())
        assert found.quantiles[i] == pytest.approx(np.quantile(values, QUANTILES))
        unclamped = np.round(values / float(layer.input_scale)) + int(layer.input_zero_point)
        saturated = ((unclamped < 0) | (unclamped > 255)).mean()
        assert found.outside[i] == pytest.approx(saturated, abs=2 / len(values))
    assert found.chosen.high - found.chosen.low == pytest.approx(255 * float(layer.input_scale))
    assert found.chosen.low <= 0 <= found.chosen.high


def test_all_layers_by_default_and_unknown_ones_are_told(pipeline, quantized) -> None:  # type: ignore[no-untyped-def]
    steps = trajectory(pipeline, num_images=1, steps=2)
    everything = activation_ranges(quantized.unet, pipeline.unet, steps)
    assert len(everything) > 10 and len({found.layer for found in everything}) == len(everything)
    with pytest.raises(OctavoError, match="conv_in is no layer with integer activations"):
        activation_ranges(quantized.unet, pipeline.unet, steps, ["conv_in"])


def one(name: str, widths: list[float], shift: float = 0.0) -> ActivationRange:
    """A layer whose range has these widths over the steps."""
    quantiles = np.outer(widths, np.linspace(-0.5, 0.5, len(QUANTILES))) + shift
    ends = quantiles[:, 0], quantiles[:, -1]
    return ActivationRange(
        name, tuple(range(len(widths))), *ends, quantiles, np.zeros(len(widths)), InputRange(1, 0, 8, -1, 1)
    )


def test_layers_worth_showing_are_the_wrong_and_the_restless() -> None:
    ranges = [one("calm", [1, 1]), one("wrong", [1, 1], 2.0), one("restless", [1, 9]), one("twin", [1, 9])]
    assert layers_worth_showing(ranges, ["wrong", "calm"], count=2) == ["wrong", "restless"]
    assert layers_worth_showing(ranges, ["wrong", "calm"], count=9) == ["calm", "wrong", "restless"]


def test_a_balanced_layer_is_looked_at_behind_its_multiplication(pipeline, quantized) -> None:  # type: ignore[no-untyped-def]
    steps = trajectory(pipeline, num_images=1, steps=2)
    balanced = copy.deepcopy(quantized.unet)
    layer = balanced.get_submodule(LAYER)
    layer.input_multiplier = torch.full((layer.in_channels,), 0.5)
    (plain,), (halved,) = (
        activation_ranges(net, pipeline.unet, steps, [LAYER]) for net in (quantized.unet, balanced)
    )
    assert halved.maximum == pytest.approx(plain.maximum / 2)

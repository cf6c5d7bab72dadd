"""Second moments against the layer itself: (w M w^T) must be the mean square of the layer's own outputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.quantization import QuantSpec, quantize_layer
from octavo.quantization.affine import qparams_from_range
from octavo.quantization.moments import SecondMoment
from octavo.quantization.rounding import round_nearest

LAYERS = {
    "linear": (nn.Linear(6, 4), (3, 5, 6)),
    "conv": (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 5)),
    "strided": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 8)),
    "dilated": (nn.Conv2d(4, 6, (3, 2), dilation=(2, 1)), (2, 4, 9, 8)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 6, 6)),
    "same": (nn.Conv2d(4, 6, (5, 3), padding="same"), (2, 4, 6, 6)),
    "circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 6, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv3d": (nn.Conv3d(4, 6, 3, padding=1), (2, 4, 5, 6, 7)),
    "over time": (nn.Conv3d(4, 6, (3, 1, 1), padding=(1, 0, 0)), (2, 4, 5, 3, 3)),
    "strided 3d": (
        nn.Conv3d(4, 6, (2, 3, 1), stride=(2, 1, 2), dilation=(2, 1, 1), groups=2),
        (2, 4, 7, 6, 5),
    ),
    "same 3d": (nn.Conv3d(4, 6, (5, 3, 3), padding="same"), (2, 4, 5, 6, 6)),
    "circular 3d": (nn.Conv3d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 4, 5, 5)),
}


class Sizes(TorchDispatchMode):
    """Bytes of the memory behind each tensor that is computed within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.bytes.append(result.untyped_storage().nbytes())
        return result


def quantized(name: str):  # type: ignore[no-untyped-def]
    layer, shape = LAYERS[name]
    torch.manual_seed(0)
    x = torch.randn(shape) + 0.3
    weights, activations = QuantSpec(8, True, "per_channel", narrow=True), QuantSpec(8, symmetric=False)
    integers, qparams = round_nearest(layer.weight, weights)
    given = qparams_from_range(activations, float(x.min()), float(x.max()))
    return quantize_layer(layer, weights, activations, integers, qparams, given), x


@pytest.mark.parametrize("name", LAYERS)
def test_it_predicts_the_power_of_the_outputs(name: str) -> None:
    layer, x = quantized(name)
    moment = SecondMoment(layer, batches=2)
    for part in x.split(1):
        moment.observe(part)
    layer.bias = None
    y = layer(x)
    power = (y.flatten(0, -2) if name == "linear" else y.movedim(1, -1).flatten(0, -2)).square().mean(dim=0)
    value = moment.value()
    weight = layer.weight.flatten(1).view(len(value), -1, value.shape[-1])
    predicted = torch.einsum("gck,gkl,gcl->gc", weight, value, weight).flatten()
    torch.testing.assert_close(predicted, power, rtol=1e-4, atol=1e-6)


def test_a_share_of_the_places_is_enough_and_drawn_by_the_seed() -> None:
    layer, _ = quantized("conv")
    x = torch.randn(4, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    full, some, again = (SecondMoment(layer, 1, seed=3, wanted=w) for w in (10**6, 2000, 2000))
    for moment in (full, some, again):
        moment.observe(x)
    assert (full.rows, some.rows) == (4096, 2000)
    assert torch.equal(some.value(), again.value())
    assert float((some.value() - full.value()).norm() / full.value().norm()) < 0.2
    assert not torch.equal(some.value(), full.value())


def test_a_long_row_keeps_its_diagonal_blocks() -> None:
    layer, x = quantized("conv")
    whole, blocks = SecondMoment(layer, 1), SecondMoment(layer, 1, most_columns=18)
    for moment in (whole, blocks):
        moment.observe(x)
    assert (whole.is_approximate, blocks.is_approximate) == (False, True)
    assert blocks.value().shape == (2, 18, 18)
    torch.testing.assert_close(blocks.value()[1], whole.value()[0, 18:, 18:])


def test_what_is_not_drawn_is_not_unfolded() -> None:
    """All patches would be six times the image; those that are drawn are the same numbers as F.unfold's."""
    layer, _ = quantized("dilated")
    x = torch.randn(1, 4, 40, 30, generator=torch.Generator().manual_seed(0))
    moment = SecondMoment(layer, 1, seed=1, wanted=50)
    found = moment._patches(x)[0]
    unfolded = F.unfold(x, (3, 2), dilation=(2, 1))[0].T
    assert len(found) == 50 and all((unfolded == row).all(dim=1).any() for row in found)
    with Sizes() as sizes:
        moment.observe(x)
    assert max(sizes.bytes) <= 1.1 * x.nbytes

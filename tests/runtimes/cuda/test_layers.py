"""Integer layers against the simulation that they come from, which tests/quantization holds against int64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integers import S8, U8, integer_layer
from torch import nn

from octavo.errors import OctavoError
from octavo.quantization import QuantSpec
from octavo.quantization.timestep_groups import CurrentGroup

pytest.importorskip("triton", reason="triton is not installed (pip install octavo[cuda])")

from octavo.runtimes.cuda import launch
from octavo.runtimes.cuda.layers import IntegerLayer

DEVICE = "cpu" if launch.interpreted() else "cuda"


def agree(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Sums of so few products are exact in the simulation, so that the two are equal to the bit."""
    ours = IntegerLayer(layer, "layer").to(DEVICE)
    if layer.current_group is not None:
        ours.current_group = CurrentGroup()
        ours.current_group.index = layer.current_group.index.to(DEVICE)
    y, expected = ours(x.to(DEVICE)).cpu(), layer(x)
    assert y.dtype == x.dtype and y.shape == expected.shape and torch.equal(y, expected)
    assert ours(x.to(DEVICE)).shape == expected.shape
    return y


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("inputs", [U8, S8, QuantSpec(4, symmetric=False)])
@pytest.mark.parametrize("shape", [(20,), (3, 20), (2, 5, 20)])
def test_linear(inputs: QuantSpec, shape: tuple[int, ...]) -> None:
    agree(integer_layer(nn.Linear(20, 9), inputs), noise(*shape))


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Conv2d(5, 7, 3, padding=1), (2, 5, 6, 4)),
        (nn.Conv2d(5, 7, 3, padding=1, stride=2, bias=False), (2, 5, 7, 6)),
        (nn.Conv2d(5, 7, 3, padding=2, dilation=2), (1, 5, 6, 6)),
        (nn.Conv2d(6, 9, 3, padding=1, groups=3), (2, 6, 4, 4)),
        (nn.Conv2d(5, 7, (2, 3), padding="same"), (2, 5, 4, 4)),
        (nn.Conv2d(5, 7, 2, stride=2, padding="valid"), (2, 5, 4, 4)),
        (nn.Conv2d(5, 7, 3, padding=1, padding_mode="circular"), (2, 5, 4, 4)),
        (nn.Conv2d(5, 7, 1), (2, 5, 4, 4)),
        (nn.Conv2d(5, 7, 1, stride=2), (2, 5, 4, 4)),
        (nn.Conv1d(5, 7, 3, padding=1), (2, 5, 8)),
        (nn.Conv1d(5, 7, 1), (2, 5, 8)),
        (nn.Conv3d(5, 7, (3, 1, 2), padding=(1, 0, 0)), (2, 5, 3, 4, 4)),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_convolution(layer: nn.Module, shape: tuple[int, ...]) -> None:
    agree(integer_layer(layer), noise(*shape))


def test_channels_last_in_and_out() -> None:
    x = noise(2, 5, 6, 4).to(memory_format=torch.channels_last)
    layer = integer_layer(nn.Conv2d(5, 7, 3, padding=1))
    agree(layer, x)
    y = IntegerLayer(layer, "layer").to(DEVICE)(x.to(DEVICE))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_an_input_that_no_strides_describe_is_copied() -> None:
    agree(integer_layer(nn.Conv2d(5, 7, 3)), noise(2, 5, 6, 8)[..., ::2])
    agree(integer_layer(nn.Linear(5, 7)), noise(5, 4, 2).transpose(0, 2))


def test_half_precision_in_and_out() -> None:
    """The interpreter of Triton 3.9 cuts a float32 off where a GPU (test_compiled) and torch round it to bfloat16."""
    for layer, x in (
        (integer_layer(nn.Conv2d(5, 7, 3, padding=1)), noise(2, 5, 4, 4)),
        (integer_layer(nn.Linear(20, 9), S8), noise(3, 20)),
    ):
        agree(layer, x.half())
        ours = IntegerLayer(layer, "layer").to(DEVICE)(x.bfloat16().to(DEVICE)).cpu()
        exact = layer(x.bfloat16().float())
        expected = (exact.view(torch.int32) >> 16 << 16).view(torch.float32) if DEVICE == "cpu" else exact
        assert ours.dtype == torch.bfloat16 and torch.equal(ours, expected.bfloat16())


@pytest.mark.parametrize("layer, shape", [(nn.Linear(20, 9), (3, 4, 20)), (nn.Conv2d(5, 7, 3), (3, 5, 4, 4))])
@pytest.mark.parametrize("balanced", [False, True])
def test_scales_by_timestep(layer: nn.Module, shape: tuple[int, ...], balanced: bool) -> None:
    """Row by row, or one group for all; a wrong group would be off by powers of 3."""
    quantized = integer_layer(layer, balanced=balanced)
    quantized.timestep_factor = torch.tensor([1.0, 3.0, 9.0])
    quantized.current_group = CurrentGroup()
    for index in ([2, 0, 1], [1]):
        quantized.current_group.index = torch.tensor(index)
        agree(quantized, noise(*shape))
    quantized.current_group.index = None
    with pytest.raises(OctavoError, match="call its network"):
        IntegerLayer(quantized, "layer").to(DEVICE)(noise(*shape).to(DEVICE))


def test_balanced() -> None:
    agree(integer_layer(nn.Conv2d(5, 7, 3, padding=1), balanced=True), noise(2, 5, 4, 4))


def test_four_bit_weights_in_groups() -> None:
    weights = QuantSpec(4, granularity="per_group", narrow=True, group_size=16)
    agree(integer_layer(nn.Linear(40, 9), weights=weights), noise(3, 40))


def test_integers_are_stored_once() -> None:
    linear = integer_layer(nn.Linear(20, 9))
    assert IntegerLayer(linear, "layer").weight.data_ptr() == linear.weight_int8.data_ptr()
    ours = IntegerLayer(integer_layer(nn.Conv2d(5, 7, 3)), "layer").half()
    stored = [b for b in ours.buffers() if b.numel() >= 5 * 7 * 9]
    assert [b.dtype for b in stored] == [torch.int8] and ours.scale.dtype == torch.float32
    assert list(ours.parameters()) == []


def test_sums_too_long_for_int32_are_refused() -> None:
    layer = integer_layer(nn.Linear(launch.MOST_DEPTH + 1, 1))
    with pytest.raises(OctavoError, match=r"mid\.proj: adds 65536 products, too many .* exclude it"):
        IntegerLayer(layer, "mid.proj")
    IntegerLayer(integer_layer(nn.Linear(launch.MOST_DEPTH, 1)), "mid.proj")

"""The kinds of layers that hold integers: fully connected ones and convolutions, each with the sums of its kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from octavo.quantization.quant_layer import QuantLayer


class QuantLinear(QuantLayer):
    """`nn.Linear` on integers: `[..., in_features]`, float dtype => `[..., out_features]`, same dtype.

    The float32 sum of integers is exact below 2^24; see the module's text for the deviation beyond.

    >>> from octavo.quantization import QuantSpec, qparams_from_range
    >>> from octavo.quantization.rounding import round_nearest
    >>> weights, activations = QuantSpec(8, granularity="per_channel", narrow=True), QuantSpec(8)
    >>> layer = nn.Linear(2, 1)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.27, -0.5]])), layer.bias.data.fill_(1.0)
    >>> integers, weight_qparams = round_nearest(layer.weight, weights, "minmax")
    >>> input_qparams = qparams_from_range(activations, -1.0, 1.27)
    >>> new = QuantLinear.from_float(layer, weights, activations, integers, weight_qparams, input_qparams)
    >>> new(torch.tensor([[1.0, 2.0]]))  # 2.0 saturates at 1.27
    tensor([[1.6350]])
    """

    float_class = nn.Linear
    shape_names = ("in_features", "out_features")
    in_features: int
    out_features: int

    def accumulate(self, q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(q, weight)


def convolution_of(weight: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The convolution that takes a weight `[out, in, ...]` of so many dimensions."""
    by_dims: dict[int, Callable[..., torch.Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
    return by_dims[weight.ndim]


class _QuantConv(QuantLayer):
    shape_names = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
        "_reversed_padding_repeated_twice",
    )
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    def accumulate(self, q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            q = F.pad(q, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0,) * (weight.ndim - 2)
        return convolution_of(weight)(q, weight, None, self.stride, padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        return (
            super()
            .extra_repr()
            .replace(f", _reversed_padding_repeated_twice={self._reversed_padding_repeated_twice}", "")
        )


class QuantConv1d(_QuantConv):
    """`nn.Conv1d` on integers: `[N, in_channels, L]`, float dtype => `[N, out_channels, L']`, same dtype.

    The float32 sum of integers is exact below 2^24; see the module's text for the deviation beyond.

    >>> from octavo.quantization import QuantSpec
    >>> specs = QuantSpec(8, True, "per_channel", narrow=True), QuantSpec(8, symmetric=False)
    >>> QuantConv1d(nn.Conv1d(4, 8, 3), *specs).weight_int8.shape
    torch.Size([8, 4, 3])
    """

    float_class = nn.Conv1d


class QuantConv2d(_QuantConv):
    """`nn.Conv2d` on integers: `[N, in_channels, H, W]`, float => `[N, out_channels, H', W']`, same dtype.

    The float32 sum of integers is exact below 2^24; see the module's text for the deviation beyond.

    >>> from octavo.quantization import QuantSpec
    >>> specs = QuantSpec(8, True, "per_channel", narrow=True), QuantSpec(8, symmetric=False)
    >>> QuantConv2d(nn.Conv2d(4, 8, 3, padding=1), *specs).weight_int8.dtype
    torch.int8
    """

    float_class = nn.Conv2d


class QuantConv3d(_QuantConv):
    """`nn.Conv3d` on integers: `[N, in_channels, D, H, W]`, float => `[N, out_channels, D', H', W']`, same dtype.

    The float32 sum of integers is exact below 2^24; see the module's text for the deviation beyond.

    >>> from octavo.quantization import QuantSpec
    >>> specs = QuantSpec(8, True, "per_channel", narrow=True), QuantSpec(8, symmetric=False)
    >>> QuantConv3d(nn.Conv3d(4, 8, (3, 1, 1)), *specs).weight_int8.shape
    torch.Size([8, 4, 3, 1, 1])
    """

    float_class = nn.Conv3d


QUANTIZED_CLASS: dict[type[nn.Module], type[QuantLayer]] = {
    kind.float_class: kind for kind in (QuantConv2d, QuantConv1d, QuantConv3d, QuantLinear)
}
"""The quantized class of each float class that can be quantized."""

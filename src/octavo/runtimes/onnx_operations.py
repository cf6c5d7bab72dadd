"""Operations of torch that stand for quantized layers while a network is exported to ONNX.

torch.export keeps each as one node, of which `octavo.runtimes.onnx_patterns` makes a pattern of ONNX. What they compute
in torch is what the pattern means, in float: integers times scales. Activations `x` are float; `scale`, `zero_point`
and `signed` say to which 8-bit integers they are rounded. Weights are int8; a bias that is subtracted is given negated.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from octavo.quantization.layers import convolution_of


@cache
def operations() -> dict[str, Any]:
    """convolution, columns, linear and product as torch.ops.octavo.qdq_<name>, made at the first call."""
    made = {}
    for function in (convolution, columns, linear, product):
        name = function.__name__
        made[name] = torch.library.custom_op(f"octavo::qdq_{name}", function, mutates_args=())
        made[name].register_fake(function)
    return made


def convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    zero_point: int,
    signed: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    """[N, C, ...], int8 [outputs, C / groups, ...], [outputs] => [N, outputs, ...]."""
    x = _rounded(x, scale, zero_point, signed)
    weights = weight.float() * weight_scale.view(-1, *[1] * (weight.ndim - 1))
    return convolution_of(weight)(x, weights, bias, stride, padding, dilation, groups)


def columns(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    negative_bias: torch.Tensor | None,
    scale: float,
    zero_point: int,
    signed: bool,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> torch.Tensor:
    """The same convolution of weights int8 [positions of the kernel x C, outputs], channels fastest."""
    weights = weight.t().reshape(weight.shape[1], *kernel, x.shape[1]).movedim(-1, 1).contiguous()
    bias = None if negative_bias is None else -negative_bias
    return convolution(
        x, weights, weight_scale, bias, scale, zero_point, signed, stride, padding, dilation, 1
    )


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    negative_bias: torch.Tensor | None,
    scale: float,
    zero_point: int,
    signed: bool,
) -> torch.Tensor:
    """[..., C], int8 [C, outputs], [outputs] => [..., outputs]."""
    y = _rounded(x, scale, zero_point, signed) @ (weight.float() * weight_scale)
    return y if negative_bias is None else y - negative_bias


def product(
    left: torch.Tensor,
    right: torch.Tensor,
    left_scale: float,
    right_scale: float,
    left_zero_point: int,
    right_zero_point: int,
    left_signed: bool,
    right_signed: bool,
) -> torch.Tensor:
    """[..., n, k], [..., k, m] => [..., n, m]."""
    a = _rounded(left, left_scale, left_zero_point, left_signed)
    return a @ _rounded(right, right_scale, right_zero_point, right_signed)


def _rounded(x: torch.Tensor, scale: float, zero_point: int, signed: bool) -> torch.Tensor:
    ends = (-128, 127) if signed else (0, 255)
    return ((x / scale).round().add(zero_point).clamp(*ends) - zero_point) * scale

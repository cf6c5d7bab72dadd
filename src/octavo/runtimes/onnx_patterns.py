"""Layers with integer activations as operations of ONNX: QuantizeLinear and DequantizeLinear around Conv and MatMul.

    x -> QuantizeLinear -> DequantizeLinear -> Conv or MatMul <- DequantizeLinear <- int8 initializer
                                               -> + bias

Scales of activations are one a tensor, of weights one an output channel. Engines that have an integer kernel for the
pattern run it on the integers; all others compute the same numbers in float. There are two dialects:

    "portable"     symmetric activations are int8 with zero point 0, convolutions are Conv: what TensorRT and OpenVINO
                   run in integers. ONNX Runtime's CPU runs some of its MatMuls so, and its Convs in float: its
                   integer kernel for them writes 8 bits and nothing else.
    "onnxruntime"  all activations are uint8 (symmetric ones with zero point 128: the same numbers), and a convolution
                   is a MatMul of the integers that each output position reads, gathered by Transpose, Pad and Gather
                   (im2col): ONNX Runtime's CPU runs it as MatMulIntegerToFloat, whose output is float.

The bias of a MatMul is subtracted, negated: ONNX Runtime would join MatMul and Add to a Gemm that it runs in float.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch

from octavo.runtimes.onnx_operations import operations

Dialect = Literal["portable", "onnxruntime"]
DIALECTS = ("portable", "onnxruntime")
OPSET = 20


def translations() -> dict[Any, Callable[..., Any]]:
    """For torch.onnx: each operation of `octavo.runtimes.onnx_operations` to its pattern; for one export."""
    made_by: dict[str, Callable[..., Any]] = {
        "convolution": _convolution,
        "columns": functools.partial(_columns, {}),
        "linear": _linear,
        "product": _product,
    }
    return {getattr(torch.ops.octavo, f"qdq_{name}").default: made_by[name] for name in operations()}


def _convolution(
    x: Any,
    weight: Any,
    weight_scale: Any,
    bias: Any,
    scale: float,
    zero_point: int,
    signed: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Any:
    op = _op()
    read, written = _dequantized(x, scale, zero_point, signed), _weight(weight, weight_scale, 0)
    operands = (read, written) if bias is None else (read, written, bias)
    return op.Conv(
        *operands, strides=list(stride), pads=[*padding, *padding], dilations=list(dilation), group=groups
    )


def _columns(
    shared: dict[bytes, Any],
    x: Any,
    weight: Any,
    weight_scale: Any,
    negative_bias: Any,
    scale: float,
    zero_point: int,
    signed: bool,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Any:
    """Integers [N, C, ...] => [N, ..., k C], of which MatMul makes [N, ..., outputs] => float [N, outputs, ...]."""
    op = _op()
    size = [int(n) for n in list(x.shape)[2:]]
    step, zero = _scale(scale), _integer(zero_point, signed)
    dims, channels = len(size), int(x.shape[1])
    q = op.Transpose(op.QuantizeLinear(x, step, zero), perm=[0, *range(2, 2 + dims), 1])
    read, outputs = read_positions(size, kernel, stride, padding, dilation)
    count = math.prod(size)
    if not np.array_equal(read[:, 0], np.arange(count)) or read.shape[1] > 1:
        q = op.Reshape(q, _numbers([0, count, channels]))
        if read.max() == count:  # one more position, which holds the zero that padding adds
            q = op.Pad(q, _numbers([0, 0, 0, 0, 1, 0]), zero)
        gathered = op.Gather(q, _shared(read.reshape(*outputs, -1), shared), axis=1)
        q = op.Reshape(gathered, _numbers([0, *outputs, read.shape[1] * channels]))
    y = op.MatMul(op.DequantizeLinear(q, step, zero), _weight(weight, weight_scale, 1))
    if negative_bias is not None:
        y = op.Sub(y, negative_bias)
    return op.Transpose(y, perm=[0, 1 + dims, *range(1, 1 + dims)])


def read_positions(
    size: list[int], kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[np.ndarray[Any, Any], list[int]]:
    """Which input positions a convolution reads for each output position, and the output's size.

    int32 [output positions, kernel positions]: positions of the input counted in rows of `size`; the number of them
    all stands for what lies outside, where padding is.

    >>> read_positions([3], [3], [2], [1], [1])
    (array([[3, 0, 1],
           [1, 2, 3]], dtype=int32), [2])
    """
    outputs = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]
    count = int(np.prod(size))
    numbered = np.pad(
        np.arange(count, dtype=np.int32).reshape(size), [(p, p) for p in padding], constant_values=count
    )
    places = [
        np.arange(m)[:, None] * s + np.arange(k)[None] * d
        for m, k, s, d in zip(outputs, kernel, stride, dilation, strict=True)
    ]  # of each axis: [outputs, kernel]
    dims = len(size)
    index = []
    for axis, place in enumerate(places):
        shape = [1] * (2 * dims)
        shape[axis], shape[dims + axis] = place.shape
        index.append(place.reshape(shape))
    return numbered[tuple(index)].reshape(int(np.prod(outputs)), -1), outputs


def _linear(
    x: Any,
    weight: Any,
    weight_scale: Any,
    negative_bias: Any,
    scale: float,
    zero_point: int,
    signed: bool,
) -> Any:
    op = _op()
    y = op.MatMul(_dequantized(x, scale, zero_point, signed), _weight(weight, weight_scale, 1))
    return y if negative_bias is None else op.Sub(y, negative_bias)


def _product(
    left: Any,
    right: Any,
    left_scale: float,
    right_scale: float,
    left_zero_point: int,
    right_zero_point: int,
    left_signed: bool,
    right_signed: bool,
) -> Any:
    return _op().MatMul(
        _dequantized(left, left_scale, left_zero_point, left_signed),
        _dequantized(right, right_scale, right_zero_point, right_signed),
    )


def _dequantized(x: Any, scale: float, zero_point: int, signed: bool) -> Any:
    op = _op()
    step, zero = _scale(scale), _integer(zero_point, signed)
    return op.DequantizeLinear(op.QuantizeLinear(x, step, zero), step, zero)


def _weight(weight: Any, weight_scale: Any, axis: int) -> Any:
    zeros = _constant(np.zeros(int(weight.shape[axis]), np.int8))
    return _op().DequantizeLinear(weight, weight_scale, zeros, axis=axis)


def _op() -> Any:
    from onnxscript import opset20

    return opset20


def _constant(array: np.ndarray[Any, Any]) -> Any:
    import onnx_ir

    return _op().Constant(value=onnx_ir.tensor(array))


def _shared(array: np.ndarray[Any, Any], known: dict[bytes, Any]) -> Any:
    """The constant of the graph that holds `array`: one for all layers of the same shape."""
    key = array.tobytes() + repr(array.shape).encode()
    if key not in known:
        known[key] = _constant(array)
    return known[key]


def _scale(value: float) -> Any:
    return _constant(np.array(value, np.float32))


def _integer(value: int, signed: bool) -> Any:
    return _constant(np.array(value, np.int8 if signed else np.uint8))


def _numbers(values: list[int]) -> Any:
    return _constant(np.array(values, np.int64))

"""Triton kernels on int8: rounding of activations, and products of matrices and convolutions with int32 sums.

Unsigned activations are moved down by 128, zero point and all, so that both operands of a tensor core's instruction are
signed. With q and z so moved, each multiplication is

    y[m, n] = (sum_k q[m, k] w[n, k] + offset[n]) scale[n] / r[m] + bias[n]        offset[n] = -z sum_k w[n, k]

in int32 and then float32, in the order of operations of the simulation (`octavo.quantization.quant_layer`); kernels are
compiled without contraction of a product and a sum into one operation, which would round otherwise. `y` may be int32:
then it takes the sums themselves, offset included. Arguments that may be None are compiled away.

Without Triton the functions are plain Python that nothing calls (`octavo.runtimes.cuda.device` says so in one line).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def _jit(function: Callable[..., Any]) -> Any:
    return function if triton is None else triton.jit(function)


@_jit
def quantize_int8(
    x,
    q,
    multiplier,
    factor,
    images,
    positions,
    channels,
    image_stride,
    position_stride,
    channel_stride,
    reciprocal_scale,
    least,
    most,
    zero_point,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """`q[i, p, c] = rint(clamp(x[i, p, c] (factor[i] multiplier[c]) / s, least, most)) + z`.

    x     float32, bfloat16 or float16 [images, positions, channels], of any strides
    q     int8 [images, positions, channels], contiguous
    multiplier, factor   float32 [channels], [images], or None
    least, most   floats: the ends of q less z, which are whole numbers

    Clamped first, a number is small enough to be rounded by adding 1.5 2^23: half to even, as torch rounds. Ends are
    whole, so that the order of the two does not matter. NaN has no integer.
    """
    row = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    image, position = row // positions, row % positions
    inside = (row < images * positions)[:, None] & (c < channels)[None, :]
    at = (image * image_stride + position * position_stride)[:, None] + (c.to(tl.int64) * channel_stride)[
        None, :
    ]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if factor is not None:
        by_image = tl.load(factor + image, mask=image < images, other=1.0)[:, None]
        if multiplier is not None:
            by_image = by_image * tl.load(multiplier + c, mask=c < channels, other=1.0)[None, :]
        value = value * by_image
    elif multiplier is not None:
        value = value * tl.load(multiplier + c, mask=c < channels, other=1.0)[None, :]
    value = value * reciprocal_scale
    value = tl.minimum(tl.maximum(value, least), most)
    rounded = (value + 12582912.0) - 12582912.0
    integer = rounded.to(tl.int32) + zero_point
    tl.store(q + row[:, None] * channels + c[None, :], integer.to(tl.int8), mask=inside)


@_jit
def _finish(sums, y, offset, scale, bias, factor, m, n, rows, columns, rows_per_image):
    """Write `sums`, int32 [M, N], to rows `m` and columns `n` of `y` by the formula of this file."""
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    at = m.to(tl.int64)[:, None] * columns + n[None, :]
    known = n < columns
    if offset is not None:
        sums += tl.load(offset + n, mask=known, other=0)[None, :]
    if y.dtype.element_ty == tl.int32:
        tl.store(y + at, sums, mask=inside)
    else:
        value = sums.to(tl.float32) * tl.load(scale + n, mask=known, other=0.0)[None, :]
        if factor is not None:
            value = value * tl.load(factor + m // rows_per_image, mask=m < rows, other=1.0)[:, None]
        if bias is not None:
            value = value + tl.load(bias + n, mask=known, other=0.0)[None, :]
        tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@_jit
def int8_matmul(
    q,
    w,
    y,
    offset,
    scale,
    bias,
    factor,
    rows,
    columns,
    depth,
    rows_per_image,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """A product of matrices, one tile [M, N] a program: linear layers, and convolutions that see one position.

    q     int8 [rows, depth];  w  int8 [columns, depth];  y  [rows, columns], all contiguous
    offset int32, scale, bias float32   [columns];  factor, the reciprocals 1 / r, float32 [rows / rows_per_image]
    """
    m = tl.program_id(0) * M + tl.arange(0, M)
    n = tl.program_id(1) * N + tl.arange(0, N)
    q_rows = q + m.to(tl.int64)[:, None] * depth
    w_rows = w + n.to(tl.int64)[None, :] * depth
    sums = tl.zeros((M, N), dtype=tl.int32)
    for start in range(0, depth, K):
        k = start + tl.arange(0, K)
        left = tl.load(q_rows + k[None, :], mask=(m < rows)[:, None] & (k < depth)[None, :], other=0)
        right = tl.load(w_rows + k[:, None], mask=(n < columns)[None, :] & (k < depth)[:, None], other=0)
        sums = tl.dot(left, right, sums, out_dtype=tl.int32)
    _finish(sums, y, offset, scale, bias, factor, m, n, rows, columns, rows_per_image)


@_jit
def int8_convolution(
    q,
    w,
    y,
    offset,
    scale,
    bias,
    factor,
    zero_point,
    images,
    in_d,
    in_h,
    in_w,
    out_d,
    out_h,
    out_w,
    channels,
    columns,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_D: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_D: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    GROUPS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """A convolution of up to three dimensions as a product of matrices whose left one is never written (implicit GEMM).

    q     int8 [images, in_d, in_h, in_w, GROUPS * channels], contiguous (channels last)
    w     int8 [GROUPS * columns, KERNEL_D, KERNEL_H, KERNEL_W, channels], contiguous
    y     [images, out_d, out_h, out_w, GROUPS * columns], contiguous; rows m are its positions
    offset, scale, bias   [GROUPS * columns];  factor, the reciprocals 1 / r, [images]

    k runs over taps of the kernel and, within each, over channels. Outside of the image q is the zero point, which
    stands for 0, so that `offset` holds at the border too. Program (i, j, g): tile i of rows, j of group g's columns.
    """
    m = tl.program_id(0) * M + tl.arange(0, M)
    of_group = tl.program_id(1) * N + tl.arange(0, N)
    group = tl.program_id(2)
    rows = images * out_d * out_h * out_w
    image = m // (out_d * out_h * out_w)
    d = (m // (out_h * out_w)) % out_d * STRIDE_D - PAD_D
    h = (m // out_w) % out_h * STRIDE_H - PAD_H
    v = m % out_w * STRIDE_W - PAD_W
    w_rows = w + (group * columns + of_group).to(tl.int64)[None, :] * (
        KERNEL_D * KERNEL_H * KERNEL_W * channels
    )
    steps = tl.cdiv(channels, K)
    sums = tl.zeros((M, N), dtype=tl.int32)
    for step in range(0, KERNEL_D * KERNEL_H * KERNEL_W * steps):
        tap = step // steps
        c = step % steps * K + tl.arange(0, K)
        at_d = d + tap // (KERNEL_H * KERNEL_W) * DILATION_D
        at_h = h + tap // KERNEL_W % KERNEL_H * DILATION_H
        at_w = v + tap % KERNEL_W * DILATION_W
        inside = (
            (m < rows)
            & (at_d >= 0)
            & (at_d < in_d)
            & (at_h >= 0)
            & (at_h < in_h)
            & (at_w >= 0)
            & (at_w < in_w)
        )
        position = ((image.to(tl.int64) * in_d + at_d) * in_h + at_h) * in_w + at_w
        left = tl.load(
            q + position[:, None] * (GROUPS * channels) + (group * channels + c)[None, :],
            mask=inside[:, None] & (c < channels)[None, :],
            other=zero_point,
        )
        right = tl.load(
            w_rows + (tap * channels + c)[:, None],
            mask=(of_group < columns)[None, :] & (c < channels)[:, None],
            other=0,
        )
        sums = tl.dot(left, right, sums, out_dtype=tl.int32)
    n = tl.where(
        of_group < columns, group * columns + of_group, GROUPS * columns
    )  # beyond the group: not written
    _finish(sums, y, offset, scale, bias, factor, m, n, rows, GROUPS * columns, out_d * out_h * out_w)

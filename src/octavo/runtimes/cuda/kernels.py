"""Triton kernels on int8: rounding of activations, and products of matrices and convolutions with int32 sums.

Unsigned activations are moved down by 128, zero point and all, so that both operands of a tensor core's instruction are
signed. With q and z so moved, each multiplication is

    y[m, n] = (sum_k q[m, k] w[n, k] + offset[n]) scale[n] / r[m] + bias[n]        offset[n] = -z sum_k w[n, k]

in int32 and then float32, in the order of operations of the simulation (`octavo.quantization.quant_layer`); kernels are
compiled without contraction of a product and a sum into one operation, which would round otherwise. `y` may be int32:
then it takes the sums themselves, offset included. Arguments that may be None are compiled away.

Where a product has few tiles and long sums, SPLIT programs share a tile: each adds its part of the sums to zeros in
int32, in whatever order, which changes no bit, and `finish_int32` does what follows. Nothing in a loop is masked that
needs no mask: the rows and columns of a tile beyond the last one wrap around and are not written, a convolution's
border is written by `quantize_int8`, and only a depth that is no multiple of K (WHOLE false) is masked, with zeros.

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
    in_d,
    in_h,
    in_w,
    out_d,
    out_h,
    out_w,
    channels,
    image_stride,
    d_stride,
    h_stride,
    w_stride,
    channel_stride,
    reciprocal_scale,
    least,
    most,
    zero_point,
    PAD_D: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """`q[i, p, c] = rint(clamp(x[i, p - PAD, c] (factor[i] multiplier[c]) / s, least, most)) + z`; z outside of `x`.

    x     float32, bfloat16 or float16 [images, in_d, in_h, in_w, channels], of any strides
    q     int8 [images, out_d, out_h, out_w, channels], contiguous: `x` with PAD positions in front and some behind
    multiplier, factor   float32 [channels], [images], or None
    least, most   floats: the ends of q less z, which are whole numbers

    Clamped first, a number is small enough to be rounded by adding 1.5 2^23: half to even, as torch rounds. Ends are
    whole, so that the order of the two does not matter. NaN has no integer.
    """
    row = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    image = row // (out_d * out_h * out_w)
    d = row // (out_h * out_w) % out_d - PAD_D
    h = row // out_w % out_h - PAD_H
    v = row % out_w - PAD_W
    written = (image < images)[:, None] & (c < channels)[None, :]
    inside = (d >= 0) & (d < in_d) & (h >= 0) & (h < in_h) & (v >= 0) & (v < in_w)
    of_row = image * image_stride + d * d_stride + h * h_stride + v * w_stride
    at = of_row[:, None] + (c.to(tl.int64) * channel_stride)[None, :]
    value = tl.load(x + at, mask=written & inside[:, None], other=0.0).to(tl.float32)
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
    tl.store(q + row[:, None] * channels + c[None, :], integer.to(tl.int8), mask=written)


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
def finish_int32(
    sums, y, offset, scale, bias, factor, rows, columns, rows_per_image, M: tl.constexpr, N: tl.constexpr
):
    """What follows sums that several programs have added: int32 `sums` [rows, columns] => `y` of the same shape."""
    m = tl.program_id(0) * M + tl.arange(0, M)
    n = tl.program_id(1) * N + tl.arange(0, N)
    at = m.to(tl.int64)[:, None] * columns + n[None, :]
    value = tl.load(sums + at, mask=(m < rows)[:, None] & (n < columns)[None, :], other=0)
    _finish(value, y, offset, scale, bias, factor, m, n, rows, columns, rows_per_image)


@_jit
def _tile(rows, columns, M: tl.constexpr, N: tl.constexpr, ABREAST: tl.constexpr):
    """The tile of this program: ABREAST tiles of rows at a time go through all columns, so that what both read is near.

    Returns its rows [M] and columns [N], which may lie beyond the last ones.
    """
    down, across = tl.cdiv(rows, M), tl.cdiv(columns, N)
    program = tl.program_id(0)
    first = program // (ABREAST * across) * ABREAST
    height = tl.minimum(down - first, ABREAST)
    inner = program % (ABREAST * across)
    m = (first + inner % height) * M + tl.arange(0, M)
    n = inner // height * N + tl.arange(0, N)
    return m, n


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
    SPLIT: tl.constexpr,
    ABREAST: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A product of matrices, one tile [M, N] a program: linear layers, and convolutions that see one position.

    q     int8 [rows, depth];  w  int8 [columns, depth];  y  [rows, columns], all contiguous
    offset int32, scale, bias float32   [columns];  factor, the reciprocals 1 / r, float32 [rows / rows_per_image]

    With SPLIT > 1, program (i, part) adds its part of the sums to `y`, int32 zeros.
    """
    m, n = _tile(rows, columns, M, N, ABREAST)
    k = tl.arange(0, K)
    q_rows = q + (m % rows).to(tl.int64)[:, None] * depth
    w_rows = w + (n % columns).to(tl.int64)[None, :] * depth
    part = tl.program_id(1)
    sums = tl.zeros((M, N), dtype=tl.int32)
    for step in range(part, tl.cdiv(depth, K), SPLIT):
        at = step * K + k
        if WHOLE:
            left = tl.load(q_rows + at[None, :])
            right = tl.load(w_rows + at[:, None])
        else:
            left = tl.load(q_rows + at[None, :], mask=(at < depth)[None, :], other=0)
            right = tl.load(w_rows + at[:, None], mask=(at < depth)[:, None], other=0)
        sums = tl.dot(left, right, sums, out_dtype=tl.int32)
    if SPLIT > 1:
        inside = (m < rows)[:, None] & (n < columns)[None, :]
        tl.atomic_add(y + m.to(tl.int64)[:, None] * columns + n[None, :], sums, mask=inside, sem="relaxed")
    else:
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
    rows,
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
    DILATION_D: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    GROUPS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    ABREAST: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A convolution of up to three dimensions as a product of matrices whose left one is never written (implicit GEMM).

    q     int8 [images, in_d, in_h, in_w, GROUPS * channels], contiguous (channels last), its border included
    w     int8 [GROUPS * columns, KERNEL_D, KERNEL_H, KERNEL_W, channels], contiguous
    y     [images, out_d, out_h, out_w, GROUPS * columns], contiguous; rows m are its positions
    offset, scale, bias   [GROUPS * columns];  factor, the reciprocals 1 / r, [images]

    k runs over taps of the kernel and, within each, over channels. The border is the zero point, which stands for 0, so
    that `offset` holds there too. Program (i, part, g): tile i of group g's columns; parts as in `int8_matmul`.
    """
    m, of_group = _tile(rows, columns, M, N, ABREAST)
    part = tl.program_id(1)
    group = tl.program_id(2)
    k = tl.arange(0, K)
    position = m % rows
    image = position // (out_d * out_h * out_w)
    d = position // (out_h * out_w) % out_d * STRIDE_D
    h = position // out_w % out_h * STRIDE_H
    v = position % out_w * STRIDE_W
    corner = ((image.to(tl.int64) * in_d + d) * in_h + h) * in_w + v
    q_rows = q + corner[:, None] * (GROUPS * channels) + group * channels
    of_rows = (group * columns + of_group % columns).to(tl.int64)
    w_rows = w + of_rows[None, :] * (KERNEL_D * KERNEL_H * KERNEL_W * channels)
    steps = tl.cdiv(channels, K)
    sums = tl.zeros((M, N), dtype=tl.int32)
    for step in range(part, KERNEL_D * KERNEL_H * KERNEL_W * steps, SPLIT):
        tap = step // steps
        c = step % steps * K + k
        at_d = tap // (KERNEL_H * KERNEL_W) * DILATION_D
        at_h = tap // KERNEL_W % KERNEL_H * DILATION_H
        at_w = tap % KERNEL_W * DILATION_W
        from_corner = ((at_d * in_h + at_h) * in_w + at_w) * (GROUPS * channels)
        if WHOLE:
            left = tl.load(q_rows + (from_corner + c)[None, :])
            right = tl.load(w_rows + (tap * channels + c)[:, None])
        else:
            left = tl.load(q_rows + (from_corner + c)[None, :], mask=(c < channels)[None, :], other=0)
            right = tl.load(w_rows + (tap * channels + c)[:, None], mask=(c < channels)[:, None], other=0)
        sums = tl.dot(left, right, sums, out_dtype=tl.int32)
    n = tl.where(
        of_group < columns, group * columns + of_group, GROUPS * columns
    )  # beyond the group: not written
    if SPLIT > 1:
        inside = (m < rows)[:, None] & (n < GROUPS * columns)[None, :]
        at = m.to(tl.int64)[:, None] * (GROUPS * columns) + n[None, :]
        tl.atomic_add(y + at, sums, mask=inside, sem="relaxed")
    else:
        _finish(sums, y, offset, scale, bias, factor, m, n, rows, GROUPS * columns, out_d * out_h * out_w)

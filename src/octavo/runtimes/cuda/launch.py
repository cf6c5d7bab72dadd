"""Triton's kernels on torch tensors: tiles chosen, launches watched by the audit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from octavo.runtimes.cuda import kernels

MOVED = 128
"""Unsigned integers are moved down by it, to signed ones."""
MOST_DEPTH = 2**16 - 1
"""Products in one sum: 2 * 128 * 128 * 65,535 < 2^31. Beyond, int32 could saturate, as a tensor core's sums do."""

Watch = Callable[[str, torch.dtype, torch.dtype], None]
_WATCH: ContextVar[Watch | None] = ContextVar("octavo_watch", default=None)


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Within the block, `watch(kernel's name, dtype of its activations, of its weights)` after each multiplication."""
    token = _WATCH.set(watch)
    try:
        yield
    finally:
        _WATCH.reset(token)


def quantize(
    x: torch.Tensor,
    reciprocal_scale: float,
    zero_point: int,
    low: int,
    high: int,
    multiplier: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """Float `[images, positions, channels]`, of any strides => int8, contiguous, by `kernels.quantize_int8`.

    `zero_point` and the ends `low` and `high` are those of the int8 numbers.
    """
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    images, positions, channels = x.shape
    block = min(128, _power(channels, 16))
    tile = max(16, 4096 // block)
    _launch(
        kernels.quantize_int8,
        (-(-images * positions // tile), -(-channels // block)),
        tile * block,
        *(x, q, multiplier, factor, images, positions, channels, *x.stride()),
        *(reciprocal_scale, float(low - zero_point), float(high - zero_point), zero_point, tile, block),
    )
    return q


def matmul(
    q: torch.Tensor,
    w: torch.Tensor,
    offset: torch.Tensor | None,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """int8 `[images, positions, depth]` and `[columns, depth]` => `[images, positions, columns]`, `dtype`.

    By `kernels.int8_matmul`; `dtype` int32 gives the sums.
    """
    images, positions, depth = q.shape
    rows, columns = images * positions, len(w)
    y = torch.empty(images, positions, columns, dtype=dtype, device=q.device)
    m, n, k = tiles(rows, columns, depth)
    _launch(
        kernels.int8_matmul,
        (-(-rows // m), -(-columns // n)),
        m * n,
        *(q, w, y, offset, scale, bias, factor, rows, columns, depth, positions, m, n, k),
    )
    _tell(kernels.int8_matmul, q, w)
    return y


def convolution(
    q: torch.Tensor,
    w: torch.Tensor,
    offset: torch.Tensor | None,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    dtype: torch.dtype,
    zero_point: int,
    out_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """int8 `[images, D, H, W, channels]` and `[columns, d, h, w, channels / groups]` => `[images, *out_size, columns]`.

    By `kernels.int8_convolution`; all of stride, padding (in front), dilation and `out_size` for three dimensions.
    """
    images, *in_size, _ = q.shape
    columns, *kernel, channels = w.shape
    y = torch.empty(images, *out_size, columns, dtype=dtype, device=q.device)
    rows, of_group = images * out_size[0] * out_size[1] * out_size[2], columns // groups
    m, n, k = tiles(rows, of_group, channels)
    _launch(
        kernels.int8_convolution,
        (-(-rows // m), -(-of_group // n), groups),
        m * n,
        *(q, w, y, offset, scale, bias, factor, zero_point, images, *in_size, *out_size, channels, of_group),
        *(*kernel, *stride, *padding, *dilation, groups, m, n, k),
    )
    _tell(kernels.int8_convolution, q, w)
    return y


def tiles(rows: int, columns: int, depth: int) -> tuple[int, int, int]:
    """The tile of a program: M, N, K. Powers of two within what tensor cores take; not yet chosen by measurement.

    With four stages on their way, the largest takes (128 + 128) * 64 * 4 bytes of a processor's shared memory.

    >>> tiles(1, 1280, 320), tiles(8192, 8, 4)
    ((16, 128, 64), (128, 16, 32))
    """
    return min(128, _power(rows, 16)), min(128, _power(columns, 16)), min(64, _power(depth, 32))


def _power(number: int, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length())


def options(tile: int) -> dict[str, Any]:
    """How a kernel whose programs write `tile` numbers each is compiled.

    By `ptxas -v` for compute capability 8.0, four warps hold a tile of 128 x 128 sums in too few registers (16 to 656
    bytes spilled), and eight spill nothing.
    """
    return {"num_warps": 8 if tile >= 128 * 128 else 4, "num_stages": 4, "enable_fp_fusion": False}


def _launch(kernel: Any, grid: tuple[int, ...], tile: int, *arguments: Any) -> None:
    if 0 not in grid:
        kernel[grid](*arguments, **options(tile))


def _tell(kernel: Any, q: torch.Tensor, w: torch.Tensor) -> None:
    if (watch := _WATCH.get()) is not None:
        watch(f"{kernel.fn.__name__}{' (interpreter)' if interpreted() else ''}", q.dtype, w.dtype)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: TRITON_INTERPRET was 1 when they were defined."""
    return type(kernels.int8_matmul).__name__ == "InterpretedFunction"

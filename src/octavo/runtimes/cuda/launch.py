"""Triton's kernels on torch tensors: tiles chosen, launches watched by the audit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch

from octavo.runtimes.cuda import kernels
from octavo.runtimes.cuda.tiles import Tile, chosen, power

MOVED = 128
"""Unsigned integers are moved down by it, to signed ones."""
MOST_DEPTH = 2**16 - 1
"""Products in one sum: 2 * 128 * 128 * 65,535 < 2^31. Beyond, int32 could saturate, as a tensor core's sums do."""

Watch = Callable[[str, str, torch.dtype, torch.dtype], None]
_WATCH: ContextVar[Watch | None] = ContextVar("octavo_watch", default=None)


@contextmanager
def watched(watch: Watch | None) -> Iterator[None]:
    """Within the block, `watch(layer, kernel's name, dtype of its activations, of its weights)` after each product.

    None: nobody watches.
    """
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
    before: Sequence[int] = (0, 0, 0),
    after: Sequence[int] = (0, 0, 0),
) -> torch.Tensor:
    """Float `[images, D, H, W, channels]`, of any strides => int8, contiguous, by `kernels.quantize_int8`.

    `zero_point` and the ends `low` and `high` are those of the int8 numbers. `before` and `after`: positions of the
    zero point around D, H and W.
    """
    images, *in_size, channels = x.shape
    size = [n + b + a for n, b, a in zip(in_size, before, after, strict=True)]
    q = torch.empty(images, *size, channels, dtype=torch.int8, device=x.device)
    block = min(128, power(channels, 16))
    tile = max(16, 4096 // block)
    rows = images * size[0] * size[1] * size[2]
    _launch(
        kernels.quantize_int8,
        (-(-rows // tile), -(-channels // block)),
        Tile(tile, block, 0),
        *(x, q, multiplier, factor, images, *in_size, *size, channels, *x.stride()),
        *(reciprocal_scale, float(low - zero_point), float(high - zero_point), zero_point),
        *(*before, tile, block),
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
    layer: str = "",
    tile: Tile | None = None,
) -> torch.Tensor:
    """int8 `[images, positions, depth]` and `[columns, depth]` => `[images, positions, columns]`, `dtype`.

    By `kernels.int8_matmul`; `dtype` int32 gives the sums. `layer` is told to who watches.
    """
    images, positions, depth = q.shape
    rows, columns = images * positions, len(w)
    tile = tile or chosen(rows, columns, depth, 1, processors(q.device))
    y = torch.empty(images, positions, columns, dtype=dtype, device=q.device)

    def multiply(into: torch.Tensor) -> None:
        _launch(
            kernels.int8_matmul,
            (tile.programs(rows, columns), tile.split),
            tile,
            *(q, w, into, offset, scale, bias, factor, rows, columns, depth, positions),
            *(tile.m, tile.n, tile.k, tile.split, tile.abreast, depth % tile.k == 0),
        )

    _in_parts(multiply, y, tile, (offset, scale, bias, factor, rows, columns, positions))
    _tell(layer, kernels.int8_matmul, q, w)
    return y


def convolution(
    q: torch.Tensor,
    w: torch.Tensor,
    offset: torch.Tensor | None,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    dtype: torch.dtype,
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    layer: str = "",
    tile: Tile | None = None,
) -> torch.Tensor:
    """int8 `[images, D, H, W, channels]`, `[columns, d, h, w, channels / groups]` => `[images, D', H', W', columns]`.

    By `kernels.int8_convolution`; `q` holds its border, stride and dilation are for three dimensions.
    """
    images, *in_size, _ = q.shape
    columns, *kernel, channels = w.shape
    size = out_size(in_size, kernel, stride, dilation)
    y = torch.empty(images, *size, columns, dtype=dtype, device=q.device)
    positions = size[0] * size[1] * size[2]
    rows, of_group = images * positions, columns // groups
    taps, of_device = kernel[0] * kernel[1] * kernel[2], processors(q.device)
    tile = tile or chosen(rows, of_group, channels, taps, max(1, of_device // groups))

    def multiply(into: torch.Tensor) -> None:
        _launch(
            kernels.int8_convolution,
            (tile.programs(rows, of_group), tile.split, groups),
            tile,
            *(q, w, into, offset, scale, bias, factor, rows, *in_size, *size, channels, of_group),
            *(*kernel, *stride, *dilation, groups),
            *(tile.m, tile.n, tile.k, tile.split, tile.abreast, channels % tile.k == 0),
        )

    _in_parts(multiply, y, tile, (offset, scale, bias, factor, rows, columns, positions))
    _tell(layer, kernels.int8_convolution, q, w)
    return y


def _in_parts(
    multiply: Callable[[torch.Tensor], None], y: torch.Tensor, tile: Tile, ending: tuple[Any, ...]
) -> None:
    """Multiply into `y`; where several programs share a tile, into zeros, and finish these."""
    if tile.split == 1:
        multiply(y)
        return
    sums = torch.zeros(y.shape, dtype=torch.int32, device=y.device)
    multiply(sums)
    *tensors, rows, columns, positions = ending
    n = min(128, power(columns, 16))
    small = Tile(max(16, 2048 // n), n, 0)
    _launch(
        kernels.finish_int32,
        (-(-rows // small.m), -(-columns // n)),
        small,
        *(sums, y, *tensors, rows, columns, positions, small.m, n),
    )


def out_size(
    in_size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    return [
        (n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(in_size, kernel, stride, dilation, strict=True)
    ]


def _launch(kernel: Any, grid: tuple[int, ...], tile: Tile, *arguments: Any) -> None:
    if 0 not in grid:
        kernel[grid](*arguments, **tile.options)


def _tell(layer: str, kernel: Any, q: torch.Tensor, w: torch.Tensor) -> None:
    if (watch := _WATCH.get()) is not None:
        watch(layer, f"{kernel.fn.__name__}{' (interpreter)' if interpreted() else ''}", q.dtype, w.dtype)


@cache
def processors(device: torch.device) -> int:
    """The GPU's streaming multiprocessors; the interpreter runs one program after the other."""
    return 1 if device.type == "cpu" else int(torch.cuda.get_device_properties(device).multi_processor_count)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: TRITON_INTERPRET was 1 when they were defined."""
    return type(kernels.int8_matmul).__name__ == "InterpretedFunction"

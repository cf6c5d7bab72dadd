"""Normalization, attention and upsampling in operations that ONNX Runtime's CPU has fast kernels for.

GroupNorm (Wu & He 1803.08494, eq. 1-3), of channel c in group g of C / G channels, over the pixels p of one image:

    M[g] = mean_{p, c in g} x[p, c],   v[g] = mean_{p, c in g} x[p, c]^2 - M[g]^2
    y[p, c] = x[p, c] a[c] + b[c],   a[c] = gamma[c] / sqrt(v[g] + eps),   b[c] = beta[c] - M[g] a[c]

in float32, means over pixels first: with channels last these are sums of rows. InstanceNormalization, which wants
channels first, is kept for small images alone; ReduceSumSquare is four times slower than a product and a mean
(docs/log.md, 2026-11-28). v loses digits where a mean is large against its spread, about 1e-7 (M / sigma)^2 of it; on
the bundled model and the coloured digits (M / sigma)^2 is at most 7.

A sub-pixel convolution (`octavo.quantization.sub_pixel`) is interleaved by one Gather of rows of D channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from octavo.quantization import SubPixelUpsample2D
from octavo.quantization.sub_pixel import PLACES, missing
from octavo.runtimes.channels_last import Normalized, channels_last
from octavo.runtimes.network import computing_by

SMALLEST = 2**15
"""Numbers in an image below which the small kernels of this form cost more than two transpositions (same entry)."""


@contextmanager
def fast_forms(network: nn.Module) -> Iterator[None]:
    """Within the block, `network` computes in these forms. Modules whose `forward` somebody set keep it."""
    upsamplings: dict[nn.Module, Callable[..., Any]] = {
        module: _upsampling(module)
        for module in network.modules()
        if isinstance(module, SubPixelUpsample2D) and "forward" not in vars(module)
    }
    with ExitStack() as stack:
        stack.enter_context(computing_by(upsamplings))
        stack.enter_context(channels_last(network, _by_squares))
        yield


def _by_squares(norm: nn.GroupNorm) -> Normalized:
    grouped = (-1, norm.num_groups, norm.num_channels // norm.num_groups)

    plain = type(norm).forward.__get__(norm)
    ones, zeros = torch.ones(norm.num_channels), torch.zeros(norm.num_channels)

    def normalized(x: Tensor, pixels: tuple[int, ...], by_channel: tuple[int, ...]) -> Tensor:
        if len(pixels) > 1 and math.prod(int(size) for size in x.shape[1:]) < SMALLEST:
            return plain(x)
        mean, square = (
            of.mean(pixels, keepdim=True).reshape(grouped).mean(2, keepdim=True) for of in (x, x * x)
        )
        spread = torch.sqrt(torch.relu(square - mean * mean) + norm.eps)
        weight, bias = (norm.weight, norm.bias) if norm.affine else (ones, zeros)
        factor = weight.view(1, *grouped[1:]) / spread
        shift = bias.view(1, *grouped[1:]) - mean * factor
        return x * factor.reshape(by_channel) + shift.reshape(by_channel)

    return normalized


def _upsampling(upsample: SubPixelUpsample2D) -> Callable[..., Tensor]:
    plain = type(upsample).forward.__get__(upsample)

    def forward(x: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        if any(missing(x, output_size)):
            result: Tensor = plain(x, output_size)
            return result
        height, width = int(x.shape[2]), int(x.shape[3])
        y = getattr(upsample, upsample.layer)(x).permute(0, 2, 3, 1)
        rows = y.reshape(-1, (height + 1) * (width + 1) * len(PLACES), upsample.channels)
        read = torch.index_select(rows, 1, _rows_read(height, width))
        return read.reshape(-1, 2 * height, 2 * width, upsample.channels).permute(0, 3, 1, 2)

    return forward


def _rows_read(height: int, width: int) -> Tensor:
    """Of `[H + 1, W + 1, 4]` rows of channels, those that the output's `[2 H, 2 W]` pixels are, int64 [4 H W].

    >>> _rows_read(1, 1)
    tensor([ 0,  5, 10, 15])
    """
    numbered = torch.arange((height + 1) * (width + 1) * len(PLACES)).view(height + 1, width + 1, len(PLACES))
    read = torch.empty(height, 2, width, 2, dtype=torch.int64)
    for place, a, b in PLACES:
        read[:, a, :, b] = numbered[a : a + height, b : b + width, place]
    return read.flatten()

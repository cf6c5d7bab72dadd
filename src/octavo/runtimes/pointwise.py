"""Linear layers as convolutions of one pixel, where the engine's kernels of these are the faster ones.

A linear layer on tokens and a convolution whose kernel is one pixel are the same sums:

    y[n, l, o] = sum_c W[o, c] x[n, l, c]   =   conv(x as an image [N, C, L, 1], W as [O, C, 1, 1]) as tokens

and in channels last both images lie in memory as the tokens do, so that the engine copies nothing. On CPUs without VNNI
OpenVINO's convolution (`jit_avx2_1x1_I8`) is 1.1 to 2.5 times as fast as its product of matrices
(`jit_gemm_I8`), measured for tokens and widths of U-Nets and transformers (benchmarks/pointwise.py). With VNNI it was
not measured, and linear layers stay products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from octavo.runtimes.saturation import adds_in_16_bits

TOKENS, IMAGE = 3, 4
"""Dimensions of `[N, L, C]` and of `[N, H, W, C]`, which have this form; others stay products."""


def convolutions_are_faster() -> bool:
    """Whether this machine's engine is one for which linear layers are written so: without VNNI."""
    return adds_in_16_bits()


def by_pixels(
    of_image: Callable[[torch.Tensor], Any], otherwise: Callable[[torch.Tensor], Any]
) -> Callable[..., Any]:
    """`of_image` with channels first as a function of tokens, or of an image in channels last; `otherwise` of others.

    `of_image` gives a tensor or a list of them.

    >>> by_pixels(lambda image: image * 2, lambda x: x)(torch.ones(1, 2, 3)).tolist()
    [[[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]]
    """

    def forward(x: torch.Tensor) -> Any:
        if x.ndim not in (TOKENS, IMAGE):
            return otherwise(x)
        y = of_image(to_image(x))
        return [from_image(one, x.ndim) for one in y] if isinstance(y, list) else from_image(y, x.ndim)

    return forward


def to_image(x: torch.Tensor) -> torch.Tensor:
    """Tokens `[N, L, C]` or an image `[N, H, W, C]` with channels first: `[N, C, L, 1]` or `[N, C, H, W]`.

    >>> to_image(torch.zeros(2, 5, 3)).shape, to_image(torch.zeros(2, 4, 5, 3)).shape
    (torch.Size([2, 3, 5, 1]), torch.Size([2, 3, 4, 5]))
    """
    return (x.unsqueeze(2) if x.ndim == TOKENS else x).permute(0, 3, 1, 2)


def from_image(y: torch.Tensor, ndim: int) -> torch.Tensor:
    """What `to_image` undoes, of an `x` with `ndim` dimensions.

    >>> from_image(to_image(torch.zeros(2, 5, 3)), 3).shape
    torch.Size([2, 5, 3])
    """
    y = y.permute(0, 2, 3, 1)
    return y.flatten(1, 2) if ndim == TOKENS else y


def as_kernel(weight: torch.Tensor) -> torch.Tensor:
    """A weight `[O, C]` as `[O, C, 1, 1]`, what is added to outputs `[O]` as `[O, 1, 1]`: a view."""
    return weight.view(*weight.shape, 1, 1)

"""The arithmetic of a balanced layer: input channel j times m[j], its weights divided by m[j], so the product stays.

Which m to take is `octavo.calibration.balance`'s affair. Source: SmoothQuant (2211.10438), eq. 3.
"""

from __future__ import annotations

import torch


def multiplied_input(x: torch.Tensor, m: torch.Tensor, weight_ndim: int) -> torch.Tensor:
    """What a balanced layer's quantizer reads: float32 `x[..., j, ...] m[j]`, the shape of `x`.

    `x`: the layer's input, `[..., K]` of a linear layer, `[N, K, (H,) W]` of a convolution; `m`: float32 `[K]`, on the
    device of `x`; `weight_ndim`: dimensions of the layer's weight, which tell the two apart.

    >>> m = torch.tensor([2.0, 4.0])
    >>> multiplied_input(torch.ones(1, 2), m, weight_ndim=2)
    tensor([[2., 4.]])
    >>> multiplied_input(torch.ones(1, 2, 2), m, weight_ndim=3)
    tensor([[[2., 2.],
             [4., 4.]]])
    """
    return x.float() * per_input_channel(m, weight_ndim)


def divided_weight(weight: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """The weight that a balanced layer rounds: `[C, K, ...]`, float => float32 `w[c, j, ...] / m[j]`, detached."""
    return weight.detach().float() / per_input_channel(m.to(weight.device), weight.ndim)


def per_input_channel(m: torch.Tensor, weight_ndim: int) -> torch.Tensor:
    """`m`, `[K]`, as it broadcasts over the layer's weight and over its input alike: `[K, 1, ...]`."""
    return m.view(-1, *[1] * (weight_ndim - 2))

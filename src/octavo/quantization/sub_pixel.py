"""Upsampling by two and the convolution behind it as one convolution of the small image: 4 products instead of 9.

Nearest-neighbour upsampling writes every pixel four times, and a 3 x 3 kernel w multiplies the copies one by one. Where
it meets copies of one pixel only the sum of its weights matters, and which those are depends on the place (a, b) of the
output within its block of 2 x 2 alone:

    u[2i + a, 2j + b] = x[i, j],   y[r, s] = sum_{k, l} w[k, l] u[r + k - 1, s + l - 1]
    y[2i + a, 2j + b] = sum_{p, q} W_ab[p, q] x[i + a + p - 1, j + b + q - 1]              p, q in {0, 1}
    W_ab[p, q] = sum_{k in K(a, p), l in K(b, q)} w[k, l]
    K(0, 0) = {0},  K(0, 1) = {1, 2},  K(1, 0) = {0, 1},  K(1, 1) = {2}

The four 2 x 2 kernels are one convolution with four times the channels, whose results are interleaved: a sub-pixel
convolution (Shi et al. 1609.05158), here with the result of the upsampling one (their note 1609.07009), zero padding
included. W is made before weights are rounded, for sums of four 8-bit integers are none; 16 weights replace 9.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from octavo.errors import OctavoError

_SUMS = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
"""[a, p, k]: 1 where k is in K(a, p)."""


PLACES = ((0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1))
"""2 a + b, a and b of each place."""


class SubPixelUpsample2D(nn.Module):
    """What diffusers' `Upsample2D` computes, by the equations above: `[N, C, H, W]` => `[N, D, 2 H, 2 W]`.

    Its one child has the name that the convolution has in the `Upsample2D` (`conv`), and is an `nn.Conv2d`, or what
    quantization puts in its place: `[N, C, H, W]` => `[N, 4 D, H + 1, W + 1]`, of which channel (2 a + b) D + d has
    place (a, b) of channel d.

    >>> from diffusers.models.upsampling import Upsample2D
    >>> plain, x = Upsample2D(4, use_conv=True), torch.randn(1, 4, 3, 5)
    >>> other = SubPixelUpsample2D.of(plain)
    >>> torch.allclose(other(x), plain(x), atol=1e-6), torch.allclose(other(x, (5, 9)), plain(x, (5, 9)), atol=1e-6)
    (True, True)
    """

    def __init__(self, channels: int, name: str, conv: nn.Module) -> None:
        super().__init__()
        self.channels, self.layer = channels, name
        self.add_module(name, conv)

    @classmethod
    def of(cls, upsample: Any) -> SubPixelUpsample2D:
        """In place of an `Upsample2D` that `convolution_name` accepts, whose weights may be on the meta device."""
        name = convolution_name(upsample)
        if name is None:
            raise TypeError(f"{upsample} is no nearest-neighbour upsampling with a 3 x 3 convolution")
        old: nn.Conv2d = getattr(upsample, name)
        weight = old.weight.detach()
        like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        new = nn.Conv2d(
            old.in_channels, 4 * old.out_channels, 2, padding=1, bias=old.bias is not None, device="meta"
        )
        sums = _SUMS.to(weight.device)
        kernels = torch.einsum("apk,bql,oikl->aboipq", sums, sums, weight.float()).flatten(0, 2)
        new.weight = nn.Parameter(kernels.to(**like), requires_grad=False)
        if old.bias is not None:
            new.bias = nn.Parameter(old.bias.detach().repeat(4), requires_grad=False)
        return cls(old.out_channels, name, new).train(upsample.training)

    def forward(
        self, hidden_states: torch.Tensor, output_size: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """`output_size`: that of the output, if it is not twice the input's: a row or column less."""
        odd_rows, odd_columns = missing(hidden_states, output_size)
        if not odd_rows and not odd_columns:
            y, height, width = getattr(self, self.layer)(hidden_states), *hidden_states.shape[2:]
            return interleaved(
                [of_place(y, place)[:, :, a : a + height, b : b + width] for place, a, b in PLACES]
            )
        # below and right of the image are zeros, and not copies of its last row and column: take what these gave off
        y = _interleaved_rows(self._columns(hidden_states, bool(odd_columns)))
        if not odd_rows:
            return y
        below = self._columns(hidden_states[:, :, -1:], bool(odd_columns), biased=False)[:, 1, :, :1]
        return torch.cat([y[:, :, :-2], y[:, :, -2:-1] - below], 2)

    def _columns(self, x: torch.Tensor, odd: bool, biased: bool = True) -> torch.Tensor:
        """`[N, 2, D, H + 1, columns]`: the results of `x` with their columns interleaved, rows yet by place."""
        y = self._by_place(x, biased)
        even_places, odd_places = y[:, :, 0, :, :, :-1], y[:, :, 1, :, :, 1:]
        across = torch.stack([even_places, odd_places], -1).flatten(-2)
        if not odd:
            return across
        beyond = self._by_place(x[..., -1:], biased=False)[:, :, 1, :, :, :1]
        return torch.cat([across[..., :-2], across[..., -2:-1] - beyond], -1)

    def _by_place(self, x: torch.Tensor, biased: bool) -> torch.Tensor:
        """`[N, a, b, D, H + 1, W + 1]`."""
        layer: Any = getattr(self, self.layer)
        if biased:
            y: torch.Tensor = layer(x)
        else:  # less what zeros give: a bias is not read from outside, where an offloaded layer has none
            beside_zeros = layer(F.pad(x, (0, 2)))
            y = beside_zeros[..., :-2] - beside_zeros[..., -2:-1]
        return y.unflatten(1, (2, 2, self.channels))


def missing(x: torch.Tensor, output_size: Any = None) -> tuple[bool, bool]:
    """Whether the output of `x` is to have a row, and a column, less than twice its own; `OctavoError` for other sizes.

    >>> missing(torch.zeros(1, 1, 4, 5)), missing(torch.zeros(1, 1, 4, 5), (7, 10))
    ((False, False), (True, False))
    """
    height, width = x.shape[2:]
    rows, columns = (2 * height, 2 * width) if output_size is None else map(int, output_size)
    if 2 * height - rows not in (0, 1) or 2 * width - columns not in (0, 1):
        raise OctavoError(
            f"output_size: {(rows, columns)} is not twice {(int(height), int(width))}, nor one less; quantize without "
            "sub_pixel"
        )
    return bool(rows % 2), bool(columns % 2)


def of_place(channels: torch.Tensor, place: int) -> torch.Tensor:
    """The D of `[..., 4 D, H, W]` channels that belong to a place."""
    return channels.unflatten(-3, (4, -1))[..., place, :, :, :]


def interleaved(places: Sequence[torch.Tensor]) -> torch.Tensor:
    """Four `[N, D, H, W]` => `[N, D, 2 H, 2 W]`, written so that engines find their DepthToSpace."""
    channels, height, width = places[0].shape[1:]
    blocks = torch.cat(list(places), 1).view(-1, 2, 2, channels, height, width)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(-1, channels, 2 * height, 2 * width)


def _interleaved_rows(y: torch.Tensor) -> torch.Tensor:
    """`[N, 2, D, H + 1, columns]` => `[N, D, 2 H, columns]`."""
    return torch.stack([y[:, 0, :, :-1], y[:, 1, :, 1:]], 3).flatten(2, 3)


def convolution_name(module: Any) -> str | None:
    """The name of the convolution in a module that `SubPixelUpsample2D` can take the place of; None for all others."""
    from diffusers.models.upsampling import Upsample2D

    if (
        type(module) is not Upsample2D
        or not module.interpolate
        or module.norm is not None
        or not module.use_conv
    ):
        return None
    if (
        module.use_conv_transpose
        or "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
    ):
        return None
    name = module.name if module.name == "conv" else "Conv2d_0"
    conv = getattr(module, name, None)
    if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or conv.groups != 1:
        return None
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    return name if shape == ((3, 3), (1, 1), (1, 1), (1, 1)) else None


def sub_pixel_names(network: nn.Module) -> list[str]:
    """The dotted names of the convolutions that are sub-pixel ones already."""
    return [
        f"{prefix}.{module.layer}"
        for prefix, module in network.named_modules()
        if isinstance(module, SubPixelUpsample2D)
    ]


def sub_pixel_layers(network: nn.Module) -> list[str]:
    """The dotted names of the convolutions behind an upsampling that can be sub-pixel ones."""
    return [
        f"{prefix}.{name}"
        for prefix, module in network.named_modules()
        if prefix and (name := convolution_name(module)) is not None
    ]


def with_sub_pixel(network: nn.Module, layers: Collection[str]) -> nn.Module:
    """A copy of `network` in which `layers`, of `sub_pixel_layers`, are sub-pixel convolutions under the same names.

    It shares all other tensors with `network`, which stays as it was.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    for layer in layers:
        upsample = network.get_submodule(layer.rpartition(".")[0])
        memo[id(upsample)] = SubPixelUpsample2D.of(upsample)
    return copy.deepcopy(network, memo)


def make_sub_pixel(network: nn.Module, layer: str) -> None:
    """The same for one layer, in place. Raises `TypeError` or `AttributeError` where there is none of that name."""
    prefix = layer.rpartition(".")[0]
    parent, _, child = prefix.rpartition(".")
    new = SubPixelUpsample2D.of(network.get_submodule(prefix))
    if f"{prefix}.{new.layer}" != layer:
        raise TypeError(f"{layer} is no convolution behind an upsampling")
    setattr(network.get_submodule(parent), child, new)

"""Integers of at most 4 bits, two to a byte: how checkpoints hold them."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.errors import OctavoError

BITS = 4
_OFFSET = 8


def pack(integers: Tensor) -> Tensor:
    """int8 `[C, ...]` of values in [-8, 7] => uint8 `[C, ceil(K / 2)]`, K the values of one output channel.

    Byte k of a channel holds value 2k + 8 in its low and value 2k + 1 + 8 in its high four bits; an odd K is filled up
    with a zero. On the meta device shapes alone.

    >>> pack(torch.tensor([[-8, 7, 1]], dtype=torch.int8))
    tensor([[240, 137]], dtype=torch.uint8)
    """
    rows = integers.flatten(1)
    if rows.shape[1] % 2:
        rows = torch.cat([rows, rows.new_zeros(len(rows), 1)], dim=1)
    shifted = (rows + _OFFSET).to(torch.uint8)
    return (shifted[:, ::2] | (shifted[:, 1::2] << BITS)).contiguous()


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """`pack` undone: uint8 `[C, ceil(K / 2)]` => int8 of `shape`, `[C, ...]` with K values a channel.

    Raises `OctavoError` if the bytes are not those of such a tensor.

    >>> unpack(pack(torch.tensor([[-8, 7, 1]], dtype=torch.int8)), torch.Size([1, 3]))
    tensor([[-8,  7,  1]], dtype=torch.int8)
    """
    columns = shape[1:].numel()
    if packed.dtype != torch.uint8 or packed.shape != (shape[0], -(-columns // 2)):
        raise OctavoError(
            f"packed: {packed.dtype} {list(packed.shape)} is not the 4-bit form of {list(shape)}"
        )
    values = torch.stack([packed & 0xF, packed >> BITS], dim=-1).flatten(1)[:, :columns]
    return (values.to(torch.int8) - _OFFSET).reshape(shape)

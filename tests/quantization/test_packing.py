"""Two integers to a byte, and back to the same integers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from octavo.errors import OctavoError
from octavo.quantization import QuantSpec, empty_layer
from octavo.quantization.packing import pack, unpack


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 6), (2, 3, 3, 3), (5, 2, 1)])
def test_every_value_comes_back(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)
    packed = pack(integers)
    columns = integers[0].numel()
    assert packed.dtype == torch.uint8 and packed.shape == (shape[0], (columns + 1) // 2)
    assert torch.equal(unpack(packed, integers.shape), integers)


def test_a_byte_holds_the_first_value_in_its_low_bits() -> None:
    integers = torch.tensor([[1, -2]], dtype=torch.int8)
    assert int(pack(integers)) == (1 + 8) + 16 * (-2 + 8)


def test_bytes_of_another_tensor_are_refused() -> None:
    packed = pack(torch.zeros(2, 4, dtype=torch.int8))
    for wrong in (torch.Size([2, 5]), torch.Size([3, 4])):
        with pytest.raises(OctavoError, match="4-bit form"):
            unpack(packed, wrong)
    with pytest.raises(OctavoError, match="4-bit form"):
        unpack(packed.to(torch.int8), torch.Size([2, 4]))


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_a_state_dict_is_packed_up_to_4_bits_and_loads_again(bits: int) -> None:
    specs = QuantSpec(bits, granularity="per_channel", narrow=True), QuantSpec(8, symmetric=False)
    layers = [empty_layer(nn.Linear(5, 3), *specs, device="cpu") for _ in range(2)]
    for i, layer in enumerate(layers):
        for tensor in (*layer.buffers(), *layer.parameters()):
            tensor.fill_(i)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randint(specs[0].qmin, specs[0].qmax + 1, (3, 5), generator=generator, dtype=torch.int8)
    layers[0].weight_int8.copy_(weight)
    stored = layers[0].state_dict()
    assert ("weight_int4" in stored) == (bits <= 4) != ("weight_int8" in stored)
    assert layers[1].load_state_dict(stored) and torch.equal(layers[1].weight_int8, weight)
    assert hasattr(layers[0], "weight_int4") == (bits <= 4)

"""Two integers to a byte, and back to the same integers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from octavo.errors import OctavoError
from octavo.quantization import QParams, QuantSpec, empty_layer, quantize_layer, round_nearest
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


@pytest.mark.parametrize("kind", [nn.Linear(11, 3), nn.Conv2d(3, 4, 3)])
def test_groups_are_stored_as_their_few_bits_and_multipliers(kind: nn.Module) -> None:
    """4 bits a weight, a byte a group, and a scale a channel; what executes comes back."""
    spec = QuantSpec(4, granularity="per_group", narrow=True, group_size=4)
    integers, qparams = round_nearest(kind.weight, spec)
    one = QParams(torch.tensor(0.1), torch.tensor(3, dtype=torch.int32))
    layer = quantize_layer(kind, spec, QuantSpec(8, symmetric=False), integers, qparams, one)
    assert int(layer.weight_int8.abs().max()) > 7, "what executes has more than 4 bits"
    stored = layer.state_dict()
    columns = integers[0].numel()
    assert stored.keys() - {"bias", "input_scale", "input_zero_point", "weight_scale"} == {
        "weight_int4",
        "group_multiplier",
    }
    assert stored["weight_int4"].shape == (len(integers), (columns + 1) // 2)
    assert stored["group_multiplier"].shape == (len(integers), (columns + 3) // 4)
    assert torch.equal(layer.weight_int4, stored["weight_int4"])
    small = unpack(stored["weight_int4"], integers.shape)
    assert int(small.abs().max()) == 7
    empty = empty_layer(kind, spec, QuantSpec(8, symmetric=False), device="cpu")
    empty.load_state_dict(stored)
    assert torch.equal(empty.weight_int8, integers) and torch.equal(layer.weight_int8, integers)
    empty.weight_int8.copy_(small)
    empty.multiply_groups()
    assert torch.equal(empty.weight_int8, integers)


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

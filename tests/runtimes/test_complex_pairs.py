from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from octavo.runtimes.complex_pairs import ComplexAsPairs, Pair
from octavo.runtimes.openvino import OpenVINOExecutor

TABLE = torch.polar(torch.ones(6, 4), torch.arange(24.0).view(6, 4))


def written(x: torch.Tensor) -> torch.Tensor:
    result = torch.zeros(3, 6, 4, dtype=x.dtype)
    result[1:, :2] = x[:2, :2]
    result[..., 0] = x[..., 1]
    return result


KNOWN: dict[str, Callable[[Any], Any]] = {
    "repeat": lambda x: x.unsqueeze(0).repeat(2, 1, 1, 1).repeat((1, 1, 2, 1)),
    "gather": lambda x: torch.gather(x, dim=1, index=torch.tensor([[[0, 1, 0, 3]]]).expand(3, 5, 4)),
    "gather, an axis from the end": lambda x: torch.gather(x, dim=-1, index=torch.ones(3, 6, 2).long()),
    "index": lambda x: torch.cat([x[0, 1:, None], x[..., 2].unsqueeze(-1)[0, 1:, None]], dim=-1),
    "written": written,
    "cat": lambda x: torch.cat([x[:, :2], x[:, 1:]], dim=-2),
    "stack": lambda x: torch.stack([x, x * 2], dim=-1),
    "flatten": lambda x: x.flatten(1) * x.flatten(0, -2).view(3, -1),
    "split": lambda x: x.split([1, 3], dim=-1)[1].expand(3, 6, -1).reshape(3, -1),
    "product with a constant": lambda x: x * TABLE.unsqueeze(0),
    "constant first": lambda x: TABLE[None] * x,
    "product with real numbers": lambda x: 2 * x * torch.arange(4.0),
    "double": lambda x: x.to(torch.complex128).clone().contiguous().to(dtype=torch.complex64),
    "unknown": lambda x: x.conj().resolve_conj() * x.exp(),
    "unknown, of a constant": lambda x: x * TABLE.conj().resolve_conj(),
    "attributes": lambda x: x * x.new_full(x.shape, x.ndim * len(x), dtype=x.dtype, device=x.device),
}


@pytest.mark.parametrize("name", KNOWN)
def test_pairs_compute_what_complex_numbers_do(name: str) -> None:
    pairs = torch.randn(3, 6, 4, 2, generator=torch.Generator().manual_seed(0))
    expected = torch.view_as_real(KNOWN[name](torch.view_as_complex(pairs.clone())))
    with ComplexAsPairs():
        result = KNOWN[name](torch.view_as_complex(pairs.clone()))
        assert isinstance(result, Pair)
        real = torch.view_as_real(result)
    torch.testing.assert_close(real, expected)


def test_real_tensors_are_left_alone() -> None:
    x = torch.randn(2, 3)
    with ComplexAsPairs():
        assert torch.equal(torch.cat([x, x])[2:] * 2, x + x)
        assert type(torch.zeros(2, dtype=torch.float32)) is torch.Tensor
    assert torch.view_as_complex(torch.zeros(1, 2)).is_complex()


class Turning(nn.Module):
    """Looks turns up in a complex table by position and repeats them, as Lumina2Transformer2DModel does."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.polar(
            torch.ones(9, 2, dtype=torch.float64), torch.arange(18.0).double().view(9, 2)
        )

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        index = ids[:, :, None].repeat(1, 1, 2)
        turns = torch.gather(self.table.unsqueeze(0).repeat(len(ids), 1, 1), 1, index)
        x = torch.view_as_complex(sample.reshape(*sample.shape[:-1], -1, 2))
        kept = torch.zeros(*turns.shape, dtype=turns.dtype)
        kept[:, 1:] = turns[:, 1:]
        turned = torch.view_as_real(x * kept).flatten(2)
        return turned.type_as(sample) * timestep[:, None, None]


def test_a_network_that_turns_by_complex_numbers_is_converted(tmp_path: Any) -> None:
    network = Turning().eval()
    executor = OpenVINOExecutor(network, precision="f32", cache=tmp_path)
    for rows in (1, 3):
        inputs = torch.randn(rows, 5, 4), torch.full((rows,), 3.0), torch.randint(0, 9, (rows, 5))
        torch.testing.assert_close(executor(*inputs), network(*inputs), rtol=1e-5, atol=1e-5)

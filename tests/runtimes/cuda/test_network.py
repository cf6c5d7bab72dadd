from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from integers import integer_layer
from torch import nn

from octavo.quantization import QuantSpec

pytest.importorskip("triton", reason="triton is not installed (pip install octavo[cuda])")

from octavo.runtimes.cuda import launch
from octavo.runtimes.cuda.network import cast, on_device, with_remainder
from octavo.runtimes.cuda.watch import watching

DEVICE = torch.device("cpu" if launch.interpreted() else "cuda")


class Network(nn.Module):
    """Image, float layer, quantized layer, float layer; one of the quantized layers is never called."""

    def __init__(self, quantized_first: bool = False) -> None:
        super().__init__()
        first: nn.Module = nn.Conv2d(3, 8, 1)
        self.first = integer_layer(first) if quantized_first else first
        self.middle = integer_layer(nn.Conv2d(8, 8, 3, padding=1))
        self.last = nn.Conv2d(8, 3, 1)
        self.idle = integer_layer(nn.Linear(8, 8))
        self.time = nn.Linear(2, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        y = y + self.time(x.new_ones(1, 2))[..., None, None]  # of the image's dtype
        y = self.middle(y)
        self.last(y[..., :1, :1])
        answer: torch.Tensor = self.last(y)
        return answer


@pytest.mark.parametrize(
    "name, dtype, expected",
    [
        ("sample", torch.float32, torch.bfloat16),
        ("encoder_hidden_states", torch.float32, torch.bfloat16),
        ("timestep", torch.float32, torch.float32),
        ("img_ids", torch.float32, torch.float32),
        ("added_cond_kwargs.time_ids", torch.float32, torch.float32),
        ("time_cond.text_embeds", torch.float32, torch.bfloat16),
        ("class_labels", torch.int64, torch.int64),
    ],
)
def test_what_bf16_cannot_tell_apart_stays_float32(
    name: str, dtype: torch.dtype, expected: torch.dtype
) -> None:
    assert cast(name, torch.ones(2, dtype=dtype), DEVICE, "bf16").dtype == expected
    assert cast(name, torch.ones(2, dtype=dtype), DEVICE, "f32").dtype == dtype


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    """As the executor has it."""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "ieee"
    yield
    cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_float_activations_are_multiplied_by_torch(precision: str) -> None:
    """With the weights that the layer holds; in the remainder's precision, as other float layers."""
    network = Network()
    network.middle = integer_layer(nn.Conv2d(8, 8, 3, padding=1), QuantSpec(32))
    other = with_remainder(on_device(network, DEVICE), precision, "first", "last")
    assert type(other.middle) is nn.Conv2d
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = network(x), other(x.to(DEVICE)).float().cpu()
    error = float((found - expected).norm() / expected.norm())
    assert error < 1e-6 if precision == "f32" else 1e-4 < error < 0.02


def test_the_original_stays_as_it_was() -> None:
    network = Network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with_remainder(on_device(network, DEVICE), "bf16", "first", "last")
    after = network.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert type(network.middle).__name__ == "QuantConv2d"


class TextFirst(Network):
    """As some U-Nets are: a text on [rows, places, features] is embedded before the image is read."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(2, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        told = self.text(torch.ones(1, 5, 2, dtype=x.dtype, device=x.device)).mean(1)
        return super().forward(x) + told.mean()


def test_a_text_that_runs_first_is_no_edge() -> None:
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    whole = on_device(TextFirst(), DEVICE)
    for image, expected in ((x, "first"), (None, "text")):
        with watching(whole, image) as seen, torch.no_grad():
            whole(x)
        assert seen.edges(whole) == (expected, "last")


def test_edges_and_what_was_launched_are_watched() -> None:
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for quantized_first, expected in ((False, ("first", "last")), (True, (None, "last"))):
        whole = on_device(Network(quantized_first), DEVICE)
        with watching(whole) as seen, torch.no_grad():
            whole(x)
        assert seen.edges(whole) == expected
        rows = {row.layer: row.precision for row in seen.audit(["middle", "idle"])}
        assert rows == {"middle": "i8", "idle": "missing"}
        half = with_remainder(whole, "bf16", *expected)
        with torch.no_grad():
            y = half(x if not quantized_first else x.bfloat16())
        assert y.dtype == torch.float32
        assert torch.allclose(y, whole(x), atol=0.05 * float(y.abs().max()))

"""As many heads as queries: OpenVINO's attention kernel must be off, and is where it need not be on."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
import pytest
import torch
from openvino import opset13
from torch import nn

from octavo.runtimes.openvino import OpenVINOExecutor
from octavo.runtimes.square_attention import has_square_attention


class Attention(nn.Module):
    """Over 16 pixels, with an operation behind it."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(64, 64)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        rows = self.project(sample).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        attended = nn.functional.scaled_dot_product_attention(rows, rows, rows)
        return 1.7 * attended.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("heads", [8, 16])
def test_an_operation_behind_attention_is_computed(heads: int, tmp_path: Any) -> None:
    """16 heads over 16 pixels were off by half."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, sample = Attention(heads).eval(), torch.randn(2, 16, 64)
    executor = OpenVINOExecutor(network, precision="f32", timesteps=0, cache=tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(executor(sample), network(sample), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "square"), [((2, 16, 16, 4), True), ((2, 8, 16, 4), False), ((2, 16, 4, 16), False)]
)
def test_it_is_told_by_the_shape(shape: tuple[int, ...], square: bool) -> None:
    rows = opset13.parameter(shape, np.float32)
    attended = opset13.scaled_dot_product_attention(rows, rows, rows)
    assert has_square_attention(openvino.Model([attended], [rows])) == square

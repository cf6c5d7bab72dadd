"""Attention with as many heads as queries, of which OpenVINO's own kernel is wrong, is computed and recognized."""

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
    """Of 16 queries, with an operation behind it."""

    def __init__(self, heads: int, written_out: bool) -> None:
        super().__init__()
        self.heads, self.written_out = heads, written_out
        self.project = nn.Linear(64, 64)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        rows = self.project(sample).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if self.written_out:
            attended = (rows @ rows.transpose(-1, -2) * rows.shape[-1] ** -0.5).softmax(-1) @ rows
        else:
            attended = nn.functional.scaled_dot_product_attention(rows, rows, rows)
        return 1.7 * attended.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize("heads", [8, 16])
def test_an_operation_behind_attention_is_computed(heads: int, written_out: bool, tmp_path: Any) -> None:
    """16 heads and 16 queries were off by half."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, sample = Attention(heads, written_out).eval(), torch.randn(2, 16, 64)
    executor = OpenVINOExecutor(network, precision="f32", timesteps=0, cache=tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(executor(sample), network(sample), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "square"), [((2, 16, 16, 4), True), ((2, 8, 16, 4), False), ((2, 16, 4, 16), False)]
)
def test_it_is_told_by_the_shape(shape: tuple[int, ...], square: bool) -> None:
    for free in (False, True):
        rows = opset13.parameter([-1, *shape[1:]] if free else shape, np.float32)
        for attended in (opset13.scaled_dot_product_attention(rows, rows, rows), opset13.softmax(rows, -1)):
            assert has_square_attention(openvino.Model([attended], [rows])) == square

"""Attention with as many heads as queries, which OpenVINO computes wrongly where its attention kernel takes on more.

OpenVINO 2026.4 tells the axes of heads and of queries apart by their sizes once an elementwise operation behind the
attention (a clamp, a scale) has moved into its kernel: with 16 heads over 16 pixels, results are off by half, and
nothing says so. With that kernel disabled (SNIPPETS_MODE) they are right, with one for each operation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import openvino

ATTENTION = "ScaledDotProductAttention"


def has_square_attention(model: openvino.Model) -> bool:
    """Whether an attention of the graph, whose shapes are static, has as many heads as queries."""
    for node in model.get_ops():
        if node.get_type_name() == ATTENTION:
            shape = node.output(0).get_partial_shape()
            if len(shape) == 4 and shape[1].is_static and shape[1] == shape[2]:
                return True
    return False

"""Attention with as many heads as queries, which OpenVINO computes wrongly once an operation behind is fused into it.

OpenVINO 2026.4 fuses attention into one kernel, and what is computed of its result element by element (a clamp, a
scale) too. It then tells the axes of heads and of queries apart by their sizes: with 16 heads and 16 queries results
are off by half, and nothing says so. That kernel is off (SNIPPETS_MODE) in graphs that hold such an attention, as one
operation or written out; each of its operations then has a kernel of its own. Measured on two cores (docs/log.md,
2026-11-29); whether more threads, among which queries are divided, bring further sizes was not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import openvino

ATTENTIONS = ("ScaledDotProductAttention", "Softmax")
"""Operations of the shape [images, heads, queries, ...]."""


def has_square_attention(model: openvino.Model) -> bool:
    """Whether an attention of the graph has as many heads as queries, as far as its shapes are known."""
    return any(node.get_type_name() in ATTENTIONS and _is_square(node) for node in model.get_ops())


def _is_square(node: Any) -> bool:
    shape = node.output(0).get_partial_shape()
    return shape.rank.is_static and len(shape) == 4 and shape[1].is_static and bool(shape[1] == shape[2])

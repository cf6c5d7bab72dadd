"""Skip connections of an ONNX graph in channels last, concatenated behind the quantizer instead of in front of it.

Up-sampling blocks concatenate with a skip connection and then normalize, activate and quantize, each number by itself
or by its channel's two numbers:

    Q(f([x, y] a + b)) = [Q(f(x a1 + b1)), Q(f(y a2 + b2))],   a = [a1, a2],   b = [b1, b2]
    mean_p [x, y] = [mean_p x, mean_p y]

What is copied is bytes instead of floats, and the sums over pixels of a skip connection are those that the
normalization behind the layer that wrote it has already taken. The numbers are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from octavo.runtimes.onnx_graph import (
    Graph,
    Model,
    Node,
    Value,
    constant,
    inserted,
    ir,
    is_large,
    is_over_pixels,
    is_per_channel,
    remove_unused,
)
from octavo.runtimes.onnx_layout import ELEMENTWISE


def concatenate_integers(model: Model) -> None:
    """Rewrite the graph, in place, in the form above: where all that reads a concatenation allows it."""
    for node in list(model.graph):
        if node.op_type == "Concat" and not node.domain and _is_large(node) and _ends(node.outputs[0]):
            _push(model.graph, node)
    remove_unused(model)


def _is_large(node: Node) -> bool:
    shape = node.outputs[0].shape
    if shape is None or len(shape) < 3 or node.attributes["axis"].as_int() != len(shape) - 1:
        return False
    return is_large(node.outputs[0])


def _ends(value: Value) -> bool:
    """Whether all that is computed from `value` comes to a quantizer or to sums over pixels."""
    return (
        not value.is_graph_output()
        and bool(value.uses())
        and all(_ends_at(user, value) for user in value.consumers())
    )


def _ends_at(user: Node, value: Value) -> bool:
    if user.domain or len(user.outputs) != 1 or user.outputs[0].is_graph_output():
        return False
    if user.op_type == "ReduceMean":
        return is_over_pixels(user, value)
    if user.op_type == "QuantizeLinear":
        return user.inputs[0] is value and all(of is not None and _is_scalar(of) for of in user.inputs[1:])
    others = [of for of in user.inputs if of is not value]
    is_known = all(
        _is_part(of, value) or _is_part(value, of) or _is_scalar(of) or is_per_channel(of, user)
        for of in others
    )
    return user.op_type in ELEMENTWISE and is_known and _ends(user.outputs[0])


def _is_part(other: Value | None, value: Value) -> bool:
    """Whether `other` is computed from `value` alone by one operation, as the sigmoid in SiLU is."""
    producer = None if other is None else other.producer()
    return (
        producer is not None
        and producer.op_type in ELEMENTWISE
        and all(of is value for of in producer.inputs)
    )


def _is_scalar(value: Value | None) -> bool:
    return value is not None and value.shape is not None and len(value.shape) == 0


def _push(graph: Graph, first: Node) -> None:
    parts: dict[Value, list[Value]] = {first.outputs[0]: list(first.inputs)}
    widths = [int(value.shape[-1]) for value in first.inputs]
    edges = np.cumsum([0, *widths]).tolist()
    for node in _from(first.outputs[0]):
        operands = [
            parts[value] if value in parts else list(_pieces(graph, node, value, edges))
            for value in node.inputs
        ]
        old = node.outputs[0]
        news = []
        for piece, width in zip(zip(*operands, strict=True), widths, strict=True):
            new = inserted(graph, node, node.op_type, list(piece), node, like=old)
            new.shape = ir.Shape([*old.shape[:-1], width])
            news.append(new)
        parts[old] = news
        if node.op_type in ("QuantizeLinear", "ReduceMean"):
            axis = ir.AttrInt64("axis", len(old.shape) - 1)
            ir.convenience.replace_all_uses_with(old, inserted(graph, node, "Concat", news, [axis], like=old))


def _from(value: Value) -> Iterator[Node]:
    """All that is computed from `value` up to the ends, in the order of the graph."""
    found: dict[Node, None] = {}
    queue = [value]
    while queue:
        for user in queue.pop().consumers():
            if user not in found:
                found[user] = None
                if user.op_type not in ("QuantizeLinear", "ReduceMean"):
                    queue.append(user.outputs[0])
    graph = value.producer().graph
    return iter([node for node in graph if node in found])


def _pieces(graph: Graph, node: Node, value: Value, edges: list[int]) -> Iterator[Value]:
    for start, stop in pairwise(edges):
        shape = value.shape
        if node.op_type in ("QuantizeLinear", "ReduceMean") or len(shape) == 0 or shape[-1] == 1:
            yield value
        else:
            ends = [constant(graph, np.array([n], np.int64)) for n in (start, stop, len(shape) - 1)]
            piece = inserted(graph, node, "Slice", [value, *ends])
            piece.dtype, piece.shape = value.dtype, ir.Shape([*shape[:-1], stop - start])
            yield piece

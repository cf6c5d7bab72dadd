"""Means over pixels of an ONNX graph in channels last, as products with a constant row.

    mean_p x[p, c] = ([1/P, ..., 1/P] x)[c]        [1, P] times [P, C], for each image

ONNX Runtime's ReduceMean over the pixels of one image is 10 times slower than over those of two, and than this product,
which is as fast as it for more images (docs/log.md, 2026-11-28). Squares are taken on the reshaped tensor.
"""

from __future__ import annotations

import math

import numpy as np

from octavo.runtimes.onnx_graph import (
    Graph,
    Model,
    Node,
    Value,
    constant,
    inserted,
    ir,
    is_over_pixels,
    remove_unused,
)


def means_by_products(model: Model) -> None:
    """Rewrite the graph, in place, in the form above: where sizes are known, and the reduced axes are kept."""
    graph = model.graph
    rows: dict[Value, Value] = {}
    for node in list(graph):
        x, mean = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type != "ReduceMean" or node.domain or x is None or not is_over_pixels(node, x):
            continue
        keeps = "keepdims" not in node.attributes or node.attributes["keepdims"].as_int()
        if not keeps or mean.is_graph_output() or not all(isinstance(size, int) for size in x.shape[1:]):
            continue
        pixels = math.prod(x.shape[1:-1])
        square = _square_of(x)
        if square is None:
            of_pixels = _rows(graph, node, x, rows)
        else:
            root = _rows(graph, x.producer(), square, rows)
            of_pixels = inserted(graph, node, "Mul", [root, root], like=root)
        weights = constant(graph, np.full((1, pixels), 1 / pixels, np.float32))
        product = inserted(graph, node, "MatMul", [weights, of_pixels], like=mean)
        ir.convenience.replace_all_uses_with(mean, product)
    remove_unused(model)


def _square_of(value: Value) -> Value | None:
    """x, where `value` is x times x, and its mean is all that is read of it."""
    node = value.producer()
    if node is None or node.op_type != "Mul" or node.domain or node.inputs[0] is not node.inputs[1]:
        return None
    return node.inputs[0] if len(value.uses()) == 1 else None


def _rows(graph: Graph, beside: Node, x: Value, known: dict[Value, Value]) -> Value:
    """[N, ..., C] as [N, 1, ..., P, C], of as many axes; one for all that read it."""
    if len(x.shape) == 3:
        return x
    if x not in known:
        sizes = [*[1] * (len(x.shape) - 3), math.prod(x.shape[1:-1]), x.shape[-1]]
        view = inserted(graph, beside, "Reshape", [x, constant(graph, np.array([0, *sizes], np.int64))])
        view.dtype, view.shape = x.dtype, ir.Shape([x.shape[0], *sizes])
        known[x] = view
    return known[x]

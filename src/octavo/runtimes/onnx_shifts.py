"""Biases and other sums with one number a channel, taken off the pixels of an ONNX graph in channels last.

A bias behind a convolution, and a time embedding behind the bias, are each a pass over the tensor. With t[c] the same
for all pixels p of an image, and h the kernel's output:

    (h - b) + t = h + (t - b)                              one pass instead of two
    (h - b) + (k - d) = (h + k) - (b + d)                  two instead of three
    mean_p (h + t) = mean_p h + t =: m'                    none, where only a group normalization
    mean_p (h + t)^2 = mean_p h^2 + t (mean_p h + m')      (`octavo.runtimes.onnx_forms`) reads h + t
    (h + t) a + b = h a + (t a + b)

What is left of t is arithmetic on [N, 1, ..., C]. Equal up to float32 rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from octavo.runtimes.onnx_graph import (
    Graph,
    Model,
    Node,
    Value,
    constant,
    constant_array,
    inserted,
    ir,
    is_large,
    is_over_pixels,
    is_per_channel,
    remove_unused,
)


def take_shifts_off(model: Model) -> None:
    """Rewrite the graph, in place, by the equations above."""
    graph = model.graph
    for node in list(graph):
        if node.op_type == "Add" and not node.domain and node.outputs[0].shape is not None:
            _merge(graph, node)
    for node in list(graph):
        if node.op_type in ("Add", "Sub") and not node.domain:
            _absorb(graph, node)
    remove_unused(model)


def _merge(graph: Graph, node: Node) -> None:
    shape = node.outputs[0].shape
    if shape is None or len(shape) < 3:  # the sum of two matrices and a MatMul would become a float Gemm
        return
    x, y = node.inputs
    first, second = _biased(x), _biased(y)
    if first is None:
        return
    h, bias, values = first
    if second is not None:
        k, _, others = second
        total = inserted(graph, node, "Add", [h, k], like=x)
        new = inserted(graph, node, "Sub", [total, constant(graph, values + others)], like=x)
    elif is_per_channel(y, node):
        new = inserted(graph, node, "Add", [h, inserted(graph, node, "Sub", [y, bias], like=y)], like=x)
    else:
        return
    ir.convenience.replace_all_uses_with(node.outputs[0], new)


def _biased(value: Value) -> tuple[Value, Value, np.ndarray[Any, Any]] | None:
    """The kernel's output, the bias and its numbers, of `h - b` that nobody else reads."""
    node = value.producer()
    if node is None or node.op_type != "Sub" or len(value.uses()) != 1 or value.is_graph_output():
        return None
    h, bias = node.inputs
    values = constant_array(bias)
    return None if values is None or values.ndim != 1 else (h, bias, values)


def _absorb(graph: Graph, node: Node) -> None:
    x, (h, t) = node.outputs[0], node.inputs
    if x.is_graph_output() or h is None or not is_per_channel(t, node) or not is_large(x):
        return
    means, squares, outputs = [], [], []
    for user in x.consumers():
        if user.op_type == "ReduceMean" and is_over_pixels(user, x):
            means.append(user)
        elif user.op_type == "Mul" and all(value is x for value in user.inputs):
            readers = list(user.outputs[0].consumers())
            if not readers or not all(
                reader.op_type == "ReduceMean" and is_over_pixels(reader, x) for reader in readers
            ):
                return
            squares += readers
        elif user.op_type == "Mul" and (add := _normalizes(user, x)) is not None:
            outputs.append((user, add))
        else:
            return
    if len(means) != 1 or len(squares) != 1 or len(outputs) != 1:
        return
    (mean,), (square,), ((product, add),) = means, squares, outputs
    like = mean.outputs[0]

    def put(beside: Node, op: str, *inputs: Value, like: Value = like, attributes: Any = ()) -> Value:
        return inserted(graph, beside, op, inputs, attributes, like)

    replace = ir.convenience.replace_all_uses_with
    if node.op_type == "Sub":
        values = constant_array(t)
        t = put(node, "Neg", t, like=t) if values is None else constant(graph, -values)
    mean_of_h = put(mean, "ReduceMean", h, mean.inputs[1], attributes=mean)
    shifted = put(mean, "Add", mean_of_h, t)
    replace(like, shifted)
    square_of_h = put(
        square, "ReduceMean", put(square, "Mul", h, h, like=h), square.inputs[1], attributes=square
    )
    of_t = put(square, "Mul", put(square, "Add", mean_of_h, shifted), t)
    replace(square.outputs[0], put(square, "Add", square_of_h, of_t))
    factor = next(value for value in product.inputs if value is not x)
    shift = next(value for value in add.inputs if value is not product.outputs[0])
    moved = put(add, "Add", put(add, "Mul", factor, t), shift)
    replace(add.outputs[0], put(add, "Add", put(add, "Mul", h, factor, like=x), moved, like=x))


def _normalizes(product: Node, x: Value) -> Node | None:
    """The sum behind `x a`, if it is `x a + b` with one number a channel in `a` and in `b`."""
    factor = next(value for value in product.inputs if value is not x)
    readers = list(product.outputs[0].consumers())
    if len(readers) != 1 or readers[0].op_type != "Add" or not is_per_channel(factor, product):
        return None
    shift = next(value for value in readers[0].inputs if value is not product.outputs[0])
    return readers[0] if is_per_channel(shift, product) else None

"""Channels last from end to end: transpositions of an ONNX graph moved along it until they meet and cancel.

A convolution by MatMul (`octavo.runtimes.onnx_patterns`) reads and writes rows of pixels with channels last, between a
transposition [N, C, ...] -> [N, ..., C] and one back. What lies between two such layers computes each number by itself
or is told its axis, and so it can be done in channels last as well:

    f(T(x), T(y)) = T(f(x, y))       T: [N, ..., C] -> [N, C, ...]; axes of reductions, slices, concatenations follow

The graph is walked once, in order. Where something reads T(x), it reads x instead and T comes behind it; T in front of
its inverse is left out. Operations that are not known here read T of what was turned, as before. The numbers are the
same. A transposition that moves axes of size one alone becomes a Reshape, which copies nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from octavo.runtimes.onnx_graph import (
    Graph,
    Model,
    Node,
    Shape,
    Value,
    constant,
    constant_array,
    infer_shapes,
    inserted,
    ir,
    remove_unused,
)

ELEMENTWISE = {
    "Abs", "Add", "Cast", "Clip", "Cos", "DequantizeLinear", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid",
    "HardSwish", "Identity", "LeakyRelu", "Max", "Min", "Mish", "Mul", "Neg", "Pow", "QuantizeLinear", "Reciprocal",
    "Relu", "Sigmoid", "Sin", "Softplus", "Sqrt", "Sub", "Tanh", "Where",
}  # fmt: skip
REDUCTIONS = {"ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"}


def keep_channels_last(model: Model) -> None:
    """Rewrite the graph, in place, in the form above."""
    infer_shapes(model)
    _Walk(model.graph).run()
    remove_unused(model)


class _Walk:
    """`turned`: a value in channels first -> the same one in channels last."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.turned: dict[Value, Value] = {}

    def run(self) -> None:
        outputs = set(self.graph.outputs)
        for node in list(self.graph):
            if node.domain or len(node.outputs) != 1 or node.outputs[0] in outputs:
                continue
            rewrite = _REWRITES.get(node.op_type)
            if rewrite is not None and _rank(node.outputs[0]) is not None:
                rewrite(self, node)

    def add(self, beside: Node, op: str, inputs: Sequence[Value | None], attributes: Any = ()) -> Value:
        return inserted(self.graph, beside, op, inputs, attributes)

    def constant(self, array: np.ndarray[Any, Any]) -> Value:
        return constant(self.graph, array)

    def written(self, node: Node, value: Value) -> None:
        """`value`, in channels last, takes the place of what `node` wrote; who cannot read it reads it turned back."""
        old = node.outputs[0]
        value.dtype = old.dtype
        value.shape = _permuted(old.shape, _to_last(len(old.shape)))
        perm = ir.AttrInt64s("perm", _to_first(len(old.shape)))
        back = inserted(self.graph, node, "Transpose", [value], [perm], old, after=True)
        self.turned[back] = value
        ir.convenience.replace_all_uses_with(old, back)

    def operand(self, node: Node, value: Value | None, rank: int) -> Value | None:
        """`value` as an operation on tensors of `rank` axes in channels last reads it; None where it cannot."""
        if value is None:
            return None
        if value in self.turned and _rank(value) == rank:
            return self.turned[value]
        array = constant_array(value)
        shape = value.shape
        if array is not None:
            if array.size == 1 and array.ndim <= rank:
                return self.constant(array.reshape(())) if array.ndim > 1 else value
            wide = array.reshape((1,) * (rank - array.ndim) + array.shape)
            return self.constant(np.ascontiguousarray(wide.transpose(_to_last(rank))))
        if shape is None or len(shape) != rank:
            return value if shape is not None and len(shape) == 0 else None
        if all(size == 1 for size in shape[2:]):
            return self.one_a_channel(node, value)
        self.turned[value] = self.add(node, "Transpose", [value], [ir.AttrInt64s("perm", _to_last(rank))])
        self.turned[value].dtype, self.turned[value].shape = value.dtype, _permuted(shape, _to_last(rank))
        return self.turned[value]

    def one_a_channel(self, node: Node, value: Value) -> Value | None:
        """[N, C, 1, ...] => [N, 1, ..., C], from the value that it is another view of."""
        images, channels, *ones = value.shape
        if not isinstance(channels, int):
            return None
        producer = value.producer()
        if producer is not None and producer.op_type in ("Reshape", "Unsqueeze") and not producer.domain:
            source = producer.inputs[0]
            sizes = [] if source.shape is None else list(source.shape[1:])
            if sizes and all(isinstance(size, int) for size in sizes) and math.prod(sizes) == channels:
                value = source
        view = self.add(node, "Reshape", [value, self.constant(np.array([0, *ones, channels], np.int64))])
        view.dtype, view.shape = value.dtype, ir.Shape([images, *ones, channels])
        return view

    def reads_turned(self, node: Node) -> bool:
        return any(value in self.turned for value in node.inputs if value is not None)


def _transpose(walk: _Walk, node: Node) -> None:
    if "perm" not in node.attributes:
        return
    (x,), perm = node.inputs, list(node.attributes["perm"].as_ints())
    rank, shape = len(perm), x.shape
    if rank > 2 and perm == _to_last(rank) and x in walk.turned:
        ir.convenience.replace_all_uses_with(node.outputs[0], walk.turned[x])
    elif rank > 2 and perm == _to_first(rank):
        walk.turned[node.outputs[0]] = x
    elif shape is not None and perm[0] == 0 and all(isinstance(size, int) for size in shape[1:]):
        wide = [axis for axis in perm if axis == 0 or shape[axis] != 1]
        if wide == sorted(wide):
            sizes = walk.constant(np.array([0, *(shape[axis] for axis in perm[1:])], np.int64))
            moved = walk.add(node, "Reshape", [x, sizes])
            moved.dtype, moved.shape = node.outputs[0].dtype, node.outputs[0].shape
            ir.convenience.replace_all_uses_with(node.outputs[0], moved)


def _elementwise(walk: _Walk, node: Node) -> None:
    rank = _rank(node.outputs[0])
    if not walk.reads_turned(node) or rank is None or rank < 3:
        return
    if node.op_type in ("QuantizeLinear", "DequantizeLinear") and _rank(node.inputs[1]) != 0:
        return
    inputs = [walk.operand(node, value, rank) for value in node.inputs]
    if all((a is None) == (b is None) for a, b in zip(inputs, node.inputs, strict=True)):
        walk.written(node, walk.add(node, node.op_type, inputs, list(node.attributes.values())))


def _concat(walk: _Walk, node: Node) -> None:
    rank = _rank(node.outputs[0])
    if not walk.reads_turned(node) or rank is None or rank < 3:
        return
    inputs = [walk.operand(node, value, rank) for value in node.inputs]
    if all(value is not None for value in inputs):
        axis = _to_first(rank)[node.attributes["axis"].as_int() % rank]
        walk.written(node, walk.add(node, "Concat", inputs, [ir.AttrInt64("axis", axis)]))


def _reduction(walk: _Walk, node: Node) -> None:
    rank, axes = _rank(node.outputs[0]), constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
    keeps = "keepdims" not in node.attributes or node.attributes["keepdims"].as_int()
    if not walk.reads_turned(node) or rank is None or axes is None or not keeps:
        return
    moved = np.array(sorted(_to_first(rank)[axis % rank] for axis in axes.tolist()), np.int64)
    inputs = [walk.turned[node.inputs[0]], walk.constant(moved)]
    walk.written(node, walk.add(node, node.op_type, inputs, list(node.attributes.values())))


def _slice(walk: _Walk, node: Node) -> None:
    rank, axes = _rank(node.outputs[0]), constant_array(node.inputs[3]) if len(node.inputs) > 3 else None
    if node.inputs[0] not in walk.turned or rank is None or axes is None:
        return
    moved = np.array([_to_first(rank)[axis % rank] for axis in axes.tolist()], np.int64)
    inputs = [walk.turned[node.inputs[0]], *node.inputs[1:3], walk.constant(moved), *node.inputs[4:]]
    walk.written(node, walk.add(node, "Slice", inputs))


def _pad(walk: _Walk, node: Node) -> None:
    rank, pads = _rank(node.outputs[0]), constant_array(node.inputs[1])
    if (
        node.inputs[0] not in walk.turned
        or rank is None
        or pads is None
        or len(node.inputs) > 3
        or pads.size != 2 * rank
    ):
        return
    moved = walk.constant(pads.reshape(2, rank)[:, _to_last(rank)].reshape(-1).astype(np.int64))
    inputs = [walk.turned[node.inputs[0]], moved, *node.inputs[2:]]
    walk.written(node, walk.add(node, "Pad", inputs, list(node.attributes.values())))


def _resize(walk: _Walk, node: Node) -> None:
    rank, scales = _rank(node.outputs[0]), constant_array(node.inputs[2]) if len(node.inputs) == 3 else None
    if (
        node.inputs[0] not in walk.turned
        or rank is None
        or scales is None
        or scales.size != rank
        or "axes" in node.attributes
    ):
        return
    inputs = [walk.turned[node.inputs[0]], None, walk.constant(scales[_to_last(rank)])]
    walk.written(node, walk.add(node, "Resize", inputs, list(node.attributes.values())))


def _reshape(walk: _Walk, node: Node) -> None:
    """Of one number a channel: as it is. Of pixels into one axis, or out of it: in channels last."""
    x, out = node.inputs[0], node.outputs[0]
    if x not in walk.turned or out.shape is None:
        return
    old, new = list(x.shape), list(out.shape)
    if all(size == 1 for size in old[2:]):
        flat = walk.add(node, "Reshape", [walk.turned[x], *node.inputs[1:]], list(node.attributes.values()))
        flat.dtype, flat.shape = out.dtype, out.shape
        ir.convenience.replace_all_uses_with(out, flat)
        return
    sizes = (*old[2:], *new[2:])
    if len(new) < 3 or old[1] != new[1] or not all(isinstance(size, int) for size in (old[1], *sizes)):
        return
    if math.prod(old[2:]) == math.prod(new[2:]):
        shape = walk.constant(np.array([0, *new[2:], new[1]], np.int64))
        walk.written(node, walk.add(node, "Reshape", [walk.turned[x], shape]))


def _conv(walk: _Walk, node: Node) -> None:
    """In channels last a kernel of one pixel is a MatMul of pixels; what any other writes is turned at once."""
    x, weight, value = node.inputs[0], constant_array(node.inputs[1]), node.outputs[0]
    rank = _rank(value)
    if rank is None or rank < 3:
        return
    if x in walk.turned and weight is not None and _is_of_pixels(node, weight):
        matrix = np.ascontiguousarray(weight.reshape(weight.shape[:2]).T)
        y = walk.add(node, "MatMul", [walk.turned[x], walk.constant(matrix)])
        if len(node.inputs) > 2:
            y.dtype, y.shape = value.dtype, _permuted(value.shape, _to_last(rank))
            y = walk.add(node, "Add", [y, node.inputs[2]])
        walk.written(node, y)
        return
    perm = ir.AttrInt64s("perm", _to_last(rank))
    turned = inserted(walk.graph, node, "Transpose", [value], [perm], after=True)
    turned.dtype, turned.shape = value.dtype, _permuted(value.shape, _to_last(rank))
    walk.turned[value] = turned


def _is_of_pixels(node: Node, weight: np.ndarray[Any, Any]) -> bool:
    given = node.attributes
    ones = [n for name in ("strides", "kernel_shape") if name in given for n in given[name].as_ints()]
    pads = list(given["pads"].as_ints()) if "pads" in given else []
    group = given["group"].as_int() if "group" in given else 1
    padded = "auto_pad" in given and given["auto_pad"].as_string() not in ("NOTSET", "VALID")
    return {*weight.shape[2:], *ones, group} == {1} and not any(pads) and not padded


_REWRITES: dict[str, Callable[[_Walk, Node], None]] = {
    "Transpose": _transpose,
    "Concat": _concat,
    "Slice": _slice,
    "Pad": _pad,
    "Resize": _resize,
    "Reshape": _reshape,
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(REDUCTIONS, _reduction),
    "Conv": _conv,
}


def _rank(value: Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _permuted(shape: Any, perm: Sequence[int]) -> Shape:
    return ir.Shape([shape[axis] for axis in perm])


def _to_last(rank: int) -> list[int]:
    """
    >>> _to_last(4), _to_first(4)
    ([0, 2, 3, 1], [0, 3, 1, 2])
    """
    return [0, *range(2, rank), 1]


def _to_first(rank: int) -> list[int]:
    """As a permutation; as a list, where each axis of channels first lies in channels last."""
    return [0, rank - 1, *range(1, rank - 1)]

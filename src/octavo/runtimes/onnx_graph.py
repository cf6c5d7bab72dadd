"""An ONNX graph edited in place: nodes put into it, and its constants.

What the passes on it share: `octavo.runtimes.onnx_layout`, `onnx_shifts`, `onnx_concat` and `onnx_sums`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

ir: Any
try:
    import onnx_ir

    ir = onnx_ir
except ImportError:  # without the extra `onnx` nothing here is called
    ir = None

Model: TypeAlias = Any
Graph: TypeAlias = Any
Node: TypeAlias = Any
Value: TypeAlias = Any
Attr: TypeAlias = Any
Shape: TypeAlias = Any
"""Those of `onnx_ir`, of which nearly every attribute may be None: what is needed is asked for where it is."""

SMALLEST = 2**16
"""Numbers in one image's tensor from which a pass over them costs more than a few small kernels (docs/log.md)."""


def inserted(
    graph: Graph,
    beside: Node,
    op: str,
    inputs: Sequence[Value | None],
    attributes: Sequence[Attr] | Node = (),
    like: Value | None = None,
    after: bool = False,
) -> Value:
    """What a new node in front of `beside` (`after`: right behind) writes; the node is named after the same module.

    attributes  those, or those of another node
    like        a value of the same type and shape
    """
    if isinstance(attributes, ir.Node):
        attributes = list(attributes.attributes.values())
    node = ir.Node("", op, inputs, attributes, num_outputs=1, metadata_props=dict(beside.metadata_props))
    (graph.insert_after if after else graph.insert_before)(beside, node)
    if like is not None:
        node.outputs[0].dtype, node.outputs[0].shape = like.dtype, like.shape
    return node.outputs[0]


def constant(graph: Graph, array: np.ndarray[Any, Any]) -> Value:
    """An initializer of the graph: one for all that are equal."""
    contents = hashlib.sha256(array.tobytes()).hexdigest()[:16]
    name = "_".join(["constant", str(array.dtype), *map(str, array.shape), contents])
    if name in graph.initializers:
        return graph.initializers[name]
    kind, tensor = ir.TensorType(ir.DataType.from_numpy(array.dtype)), ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=kind, const_value=tensor)
    graph.register_initializer(value)
    return value


def constant_array(value: Value | None) -> np.ndarray[Any, Any] | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def infer_shapes(model: Model) -> None:
    """Note the type and shape of each value, where they follow from the inputs'."""
    from onnx_ir.passes.common import ShapeInferencePass

    ShapeInferencePass()(model)


def remove_unused(model: Model) -> None:
    """Leave out nodes and constants that nothing reads."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)


def is_large(value: Value) -> bool:
    """Whether one image's numbers are so many that a pass over them costs more than a few small kernels."""
    sizes: list[Any] = [] if value.shape is None else list(value.shape[1:])
    return bool(sizes) and all(isinstance(size, int) for size in sizes) and math.prod(sizes) >= SMALLEST


def is_over_pixels(node: Node, x: Value) -> bool:
    axes = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
    return axes is not None and x.shape is not None and axes.tolist() == list(range(1, len(x.shape) - 1))


def is_per_channel(value: Value | None, node: Node) -> bool:
    """Whether `value` has one number, or one an image, for each of the last axis of what the node writes."""
    output = node.outputs[0].shape
    if value is None or value.shape is None or output is None or len(output) < 3:
        return False
    sizes: Sequence[Any] = list(value.shape)
    wide = [1] * (len(output) - len(sizes)) + list(sizes)
    return len(wide) == len(output) and wide[-1] == output[-1] and all(size == 1 for size in wide[1:-1])

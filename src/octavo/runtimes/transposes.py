"""Pairs of transposes that undo each other around what is computed number by number, taken out of a graph.

Between two linear layers that became convolutions (`octavo.runtimes.pointwise`) tokens are no tokens for longer than an
activation and a quantizer take:

    convolution -> [N, L, 1, C] -> [N, L, C] -> GELU, FakeQuantize, ... -> [N, L, 1, C] -> [N, C, L, 1] -> convolution

What is in between is given the image [N, C, L, 1] itself; the engine then fuses it into the first convolution, which
writes the integers that the second one reads. Of the tensor as tokens the engine would make a copy in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import openvino

TO_LAST, TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]
ELEMENTWISE = {
    *("Gelu", "Swish", "Sigmoid", "Relu", "Tanh", "Exp", "Clamp", "HSwish", "SoftPlus", "Mish", "Elu"),
    *("Add", "Subtract", "Multiply", "Divide", "FakeQuantize"),
}
"""Operations on tensors of one shape, or on one and on constants that are broadcast over it."""


def without_pairs(model: openvino.Model) -> int:
    """Take the pairs out of `model`, in place. Returns how many of the second ones are gone."""
    import openvino

    gone = 0
    for node in model.get_ordered_ops():
        if _order(node) != TO_FIRST:
            continue
        source = node.input_value(0)
        if source.get_node().get_type_name() == "Unsqueeze" and _axes(source.get_node()) == [2]:
            source = source.get_node().input_value(0)
        between: list[Any] = []
        if not _collect(source, between):
            continue
        for operation in between:
            for port in operation.inputs():
                given = port.get_source_output()
                if given.get_node().get_type_name() == "Constant":
                    constant = _by_channel(given)
                    port.replace_source_output(openvino.opset13.constant(constant).output(0))
                elif (first := _image(given)) is not None:
                    port.replace_source_output(first)
        image = source if between else _image(source)
        for port in node.output(0).get_target_inputs():
            port.replace_source_output(image)
        gone += 1
    if gone:
        model.validate_nodes_and_infer_types()
    return gone


def _collect(output: Any, between: list[Any]) -> bool:
    """Whether all that `output` is computed from, number by number, are images and constants: these operations."""
    if _image(output) is not None:
        return True
    node = output.get_node()
    if node.get_type_name() == "Constant":
        return _by_channel(output) is not None
    is_alone = len(output.get_target_inputs()) == 1
    if node.get_type_name() not in ELEMENTWISE or not is_alone or node in between:
        return False
    if node.get_type_name() == "FakeQuantize" and any(
        _size(node.input_value(i)) != 1 for i in range(1, node.get_input_size())
    ):
        return False
    between.append(node)
    return all(_collect(node.input_value(i), between) for i in range(node.get_input_size()))


def _image(output: Any) -> Any:
    """What `output` is as an image with channels first, if it was one just before; else None."""
    node = output.get_node()
    if node.get_type_name() == "Reshape":  # of [N, L, 1, C] to tokens
        shape, tokens = node.input_value(0).get_partial_shape(), output.get_partial_shape()
        one_wide = len(shape) == 4 and shape[2].is_static and shape[2].get_length() == 1
        if not (one_wide and len(tokens) == 3 and shape[3] == tokens[2]):
            return None
        node = node.input_value(0).get_node()
    return node.input_value(0) if _order(node) == TO_LAST else None


def _order(node: Any) -> list[int] | None:
    if node.get_type_name() != "Transpose":
        return None
    order = node.input_value(1).get_node()
    return [int(i) for i in order.data.flatten()] if order.get_type_name() == "Constant" else None


def _axes(node: Any) -> list[int] | None:
    axes = node.input_value(1).get_node()
    return [int(i) for i in axes.data.flatten()] if axes.get_type_name() == "Constant" else None


def _by_channel(output: Any) -> Any:
    """A constant that is one number, or has one for a channel, as it is broadcast over an image; else None."""
    values = output.get_node().data
    if values.size == 1:
        return values.reshape(())
    if values.shape and values.size == values.shape[-1]:
        return np.ascontiguousarray(values.reshape(-1, 1, 1))
    return None


def _size(output: Any) -> int:
    shape = output.get_partial_shape()
    return int(np.prod(list(shape.to_shape()))) if shape.is_static else -1

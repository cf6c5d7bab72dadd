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

from octavo.runtimes.pointwise import IMAGE, TOKENS

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
        source, rank = node.input_value(0), IMAGE
        if source.get_node().get_type_name() == "Unsqueeze" and _numbers(source.get_node()) == [2]:
            if len(source.get_target_inputs()) != 1:
                continue
            source, rank = source.get_node().input_value(0), TOKENS
        between: list[Any] = []
        images: list[Any] = []
        if not _collect(source, rank, between, images) or not images:
            continue
        for operation in between:
            for port in operation.inputs():
                given = port.get_source_output()
                if given.get_node().get_type_name() == "Constant":
                    port.replace_source_output(openvino.opset13.constant(_by_channel(given)).output(0))
                elif (first := _image(given, rank)) is not None:
                    port.replace_source_output(first)
        last = source if between else images[0]
        for port in node.output(0).get_target_inputs():
            port.replace_source_output(last)
        gone += 1
    if gone:
        model.validate_nodes_and_infer_types()
    return gone


def _collect(output: Any, rank: int, between: list[Any], images: list[Any]) -> bool:
    """Whether all that `output` is computed from, number by number, are images and constants: gathered in `between`.

    `rank`: that of tokens, or of an image with channels last, which all of it must have.
    """
    image = _image(output, rank)
    if image is not None:
        images.append(image)
        return True
    node = output.get_node()
    if node.get_type_name() == "Constant":
        return _by_channel(output) is not None
    is_alone = len(output.get_target_inputs()) == 1
    if node.get_type_name() not in ELEMENTWISE or not is_alone or _rank(output) != rank:
        return False
    if node.get_type_name() == "FakeQuantize" and any(
        _size(node.input_value(i)) != 1 for i in range(1, node.get_input_size())
    ):
        return False
    between.append(node)
    return all(_collect(node.input_value(i), rank, between, images) for i in range(node.get_input_size()))


def _image(output: Any, rank: int) -> Any:
    """What `output` is as an image with channels first, if it was one just before; else None."""
    node = output.get_node()
    if rank == TOKENS:
        if node.get_type_name() != "Reshape":  # of [N, L, 1, C] to [N, L, C]
            return None
        image, tokens = _row(node.input_value(0)), _row(output)
        if tokens is None or len(tokens) != 2 or image != [tokens[0], 1, tokens[1]]:
            return None
        node = node.input_value(0).get_node()
    return node.input_value(0) if _order(node) == TO_LAST else None


def _order(node: Any) -> list[int] | None:
    return _numbers(node) if node.get_type_name() == "Transpose" else None


def _numbers(node: Any) -> list[int] | None:
    """The second input, axes or their order, where it is a constant."""
    given = node.input_value(1).get_node()
    return [int(i) for i in given.data.flatten()] if given.get_type_name() == "Constant" else None


def _by_channel(output: Any) -> Any:
    """A constant that is one number, or has one for a channel, as it is broadcast over an image; else None."""
    values = output.get_node().data
    if values.size == 1:
        return values.reshape(())
    if values.shape and values.size == values.shape[-1]:
        return np.ascontiguousarray(values.reshape(-1, 1, 1))
    return None


def _rank(output: Any) -> int:
    rank = output.get_partial_shape().rank
    return int(rank.get_length()) if rank.is_static else -1


def _row(output: Any) -> list[int] | None:
    """The shape behind the first axis; None where that is not known."""
    shape = output.get_partial_shape()
    if shape.rank.is_dynamic or not all(size.is_static for size in list(shape)[1:]):
        return None
    return [size.get_length() for size in list(shape)[1:]]


def _size(output: Any) -> int:
    shape = output.get_partial_shape()
    return int(np.prod(list(shape.to_shape()))) if shape.is_static else -1

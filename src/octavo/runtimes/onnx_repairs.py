"""What torch and ONNX Runtime get wrong between them, put right: squeezed axes, and zero points that weights share.

`squeeze` of an axis whose size is not 1 changes nothing in torch (PixArt squeezes its tokens). The exporter of torch
2.13 writes Squeeze for it all the same (`aten_squeeze_dim` of onnxscript's torchlib), which every engine refuses.

torch's optimizer keeps equal initializers once, and so layers with as many output channels read their zero points from
one. With `session.x64quantprecision` (`octavo.runtimes.onnx_session`) ONNX Runtime 1.32 makes a uint8 copy of each
weight beyond 7 bits and of its zero points, under a name made of theirs; of the second layer it finds that name taken,
and does not load the graph: "Attempt to replace the existing tensor".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import onnx

ZERO_POINT = "_zero_point"
"""What a weight's zero points are called after the weight's own name."""


def repaired_translations() -> dict[Any, Callable[..., Any]]:
    """For torch.onnx: the overloads of `aten.squeeze`, each to the axes that are of size 1."""
    squeeze = torch.ops.aten.squeeze
    return {
        squeeze.default: lambda x: _squeezed(x, range(len(x.shape))),
        squeeze.dim: lambda x, dim: _squeezed(x, [dim]),
        squeeze.dims: _squeezed,
    }


def _squeezed(x: Any, dims: Sequence[int]) -> Any:
    """`x` without those of `dims` whose size is 1; a free number of rows is none, whatever it is in a call."""
    from onnxscript import opset20

    op: Any = opset20
    ones = sorted({dim % len(x.shape) for dim in dims if len(x.shape) and x.shape[dim] == 1})
    return op.Squeeze(x, op.Constant(value_ints=ones)) if ones else op.Identity(x)


def give_own_zero_points(model: onnx.ModelProto) -> None:
    """Let each DequantizeLinear of an initializer read zero points of its own, named after the initializer."""
    import onnx

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    seen: set[str] = set()
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in constants or len(node.input) < 3:
            continue
        shared, own = node.input[2], f"{node.input[0]}{ZERO_POINT}"
        if shared in seen and own not in constants:
            constants[own] = onnx.TensorProto()
            constants[own].CopyFrom(constants[shared])
            constants[own].name = own
            model.graph.initializer.append(constants[own])
            node.input[2] = own
        seen.add(shared)

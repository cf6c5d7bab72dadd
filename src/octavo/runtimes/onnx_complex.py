"""Complex numbers that depend on no input (rotary frequencies), computed before a network is exported to ONNX.

ONNX has no operations on complex numbers. torch's exporter writes pairs of real ones for a few operations (a product,
`view_as_real`), and fails on the slices, splits and concatenations by which QwenImage puts the frequencies of its
positions together: "No decompositions registered for the complex-valued input" (torch 2.13). These read constants
alone, so what they give is one more constant.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

CONSTANTS = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}
NAME = "c_complex_constant_{}"


def fold_complex_constants(exported: torch.export.ExportedProgram) -> None:
    """Replace, in place, each complex tensor that no input of the program takes part in."""
    graph, folded = exported.graph_module.graph, _folded(exported)
    for node, value in folded.items():
        if isinstance(value, torch.Tensor) and any(user not in folded for user in node.users):
            node.replace_all_uses_with(_added(exported, value, node.meta["val"]))
    if folded:
        graph.eliminate_dead_code()
        exported.graph_module.recompile()


def _folded(exported: torch.export.ExportedProgram) -> dict[torch.fx.Node, Any]:
    """What the operations on complex constants give."""
    known: dict[torch.fx.Node, Any] = dict(_constants(exported))
    folded = {}
    for node in exported.graph.nodes:
        read = node.all_input_nodes
        if node.op != "call_function" or not read or not all(one in known for one in read):
            continue
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), known.__getitem__)
        if any(_is_complex(known[one]) for one in read):
            known[node] = folded[node] = node.target(*args, **kwargs)
    return folded


def _constants(exported: torch.export.ExportedProgram) -> Iterator[tuple[torch.fx.Node, torch.Tensor]]:
    placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"]
    tensors = {**exported.state_dict, **exported.constants}
    for node, spec in zip(placeholders, exported.graph_signature.input_specs, strict=True):
        if spec.kind in CONSTANTS and spec.target is not None:
            yield node, tensors[spec.target]


def _is_complex(value: Any) -> bool:
    tensors = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(tensor, torch.Tensor) and tensor.is_complex() for tensor in tensors)


def _added(exported: torch.export.ExportedProgram, value: torch.Tensor, like: Any) -> torch.fx.Node:
    """A further constant of the program, in front of all its inputs."""
    graph, specs = exported.graph_module.graph, exported.graph_signature.input_specs
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    first = next(i for i, spec in enumerate(specs) if spec.kind is InputKind.USER_INPUT)
    name = NAME.format(len(specs))
    with graph.inserting_before(placeholders[first]):
        node = graph.placeholder(name)
    node.meta["val"] = like
    specs.insert(first, InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(node.name), name))
    exported.constants[name] = value.contiguous()
    return node

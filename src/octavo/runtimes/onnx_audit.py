"""The audit of ONNX Runtime: by which kernel its optimized graph runs each layer with integer activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.quantization.attention_calls import product_name
from octavo.runtimes.audit import AuditRow
from octavo.runtimes.onnx_convert import PRODUCT, WEIGHT, layer_prefix

if TYPE_CHECKING:
    import onnx

INTEGER_KERNELS = {
    "QLinearConv",
    "QGemm",
    "QLinearMatMul",
    "MatMulIntegerToFloat",
    "ConvInteger",
    "MatMulInteger",
}
FLOAT_KERNELS = {"Conv", "FusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm"}
_DEPTH = 4
"""Nodes between an int8 initializer and the multiplication that reads it: DequantizeLinear, a reordering or two."""


def audit_optimized(path: Path, layers: Iterable[str]) -> list[AuditRow]:
    """One row per name (`octavo.runtimes.audit.audited`), read from the graph that ONNX Runtime wrote to `path`.

    A kernel belongs to a layer when it reads the layer's int8 initializer, by itself or through operations that do not
    multiply; to a product of attention when its output has the product's name. Where several do, a float one is
    reported before an integer one; `precision` is "i8" for integer kernels.
    """
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return [_row(layer, _kernels(graph, readers, layer)) for layer in layers]


def _kernels(graph: onnx.GraphProto, readers: dict[str, list[onnx.NodeProto]], layer: str) -> Iterator[str]:
    weights = f"{layer_prefix(layer)}{WEIGHT}"
    for name in [name for name in readers if name.startswith(weights)]:
        yield from _multiplications(readers, name, _DEPTH)
    for node in graph.node:
        if any(name.startswith(f"{layer_prefix(layer)}{PRODUCT}") for name in node.output):
            yield node.op_type


def _multiplications(readers: dict[str, list[onnx.NodeProto]], name: str, depth: int) -> Iterator[str]:
    for node in readers.get(name, ()) if depth else ():
        if node.op_type in INTEGER_KERNELS | FLOAT_KERNELS:
            yield node.op_type
        else:
            for output in node.output:
                yield from _multiplications(readers, output, depth - 1)


def _row(layer: str, kernels: Iterable[str]) -> AuditRow:
    found = sorted(kernels, key=lambda kernel: kernel in INTEGER_KERNELS)
    if not found:
        return AuditRow(product_name(layer), "none", "missing")
    return AuditRow(product_name(layer), found[0], "i8" if found[0] in INTEGER_KERNELS else "f32")

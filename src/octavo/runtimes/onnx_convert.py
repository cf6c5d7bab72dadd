"""From a torch denoiser to an ONNX graph whose layers with integer activations carry int8 weights as initializers."""

from __future__ import annotations

import ast
import contextlib
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from octavo.errors import OctavoError
from octavo.quantization import QuantLayer, QuantProduct, QuantSpec, quantized_layers, quantized_products
from octavo.runtimes.audit import audited
from octavo.runtimes.calls import Call
from octavo.runtimes.convert import KERNEL_BITS
from octavo.runtimes.network import computing_by
from octavo.runtimes.onnx_forms import fast_forms
from octavo.runtimes.onnx_operations import operations
from octavo.runtimes.onnx_patterns import Dialect
from octavo.runtimes.onnx_repairs import give_own_zero_points
from octavo.runtimes.onnx_trace import program_of, quiet

if TYPE_CHECKING:
    import onnx

WEIGHT, BIAS = "onnx_weight", "onnx_bias"
"""A layer's initializers are called `<layer>.onnx_weight` and `<layer>.onnx_bias`; the audit knows layers by them."""
PRODUCT = "onnx_product"
OWNER, ROWS = "denoiser.", "rows"
LARGEST = 2**31 - 2**26
"""Bytes of weights beyond which they lie in a file of their own: a protobuf has at most 2^31."""


def require_onnx() -> None:
    """Raise `OctavoError` unless all is there that writes and runs ONNX graphs."""
    for package in ("onnx", "onnxruntime", "onnxscript"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise OctavoError(
                f"{package} cannot be imported ({error}): pip install -e '.[onnx]' in Octavo's checkout"
            ) from error


def to_onnx(
    denoiser: nn.Module, call: Call, dialect: Dialect = "portable", dynamic_rows: bool = True
) -> onnx.ModelProto:
    """Convert `denoiser`, as `call` calls it, to a graph of standard ONNX operations (opset 20).

    Inputs are named as the call's tensors, outputs `output`, `output_1`, ... Each layer with integer activations, and
    each product of attention, becomes a pattern of `octavo.runtimes.onnx_patterns`; its int8 weights are handed over as
    they are. A layer whose activations stay float has float32 weights there: of int8 ones in front of a float product
    OpenVINO takes leave to round the activations too, by scales of its own (2026.4, on CPUs with VNNI: 1.6 % of the
    output of a fully connected layer).

    For ONNX Runtime a network with integer layers is kept in channels last from end to end, and its normalizations,
    biases and skip connections are written as they are fast there (`octavo.runtimes.onnx_forms`, `onnx_layout`,
    `onnx_shifts`, `onnx_concat`, `onnx_sums`).

    Fewer activation bits than 8 are cut off at the ends of their own range first, as for OpenVINO
    (`octavo.runtimes.convert`). `dynamic_rows`: any number of images, else that of the call.

    `denoiser` is float32 and is left as it was. Raises `FixedRows` for a network of which no graph for any number of
    images can be made, and `OctavoError` where torch cannot export it.
    """
    is_lean = dialect == "onnxruntime" and bool(audited(denoiser))
    forms = fast_forms(denoiser) if is_lean else contextlib.nullcontext()
    with torch.inference_mode(False), torch.no_grad(), patterns(denoiser, dialect), forms:
        program = program_of(denoiser, call, dynamic_rows)
    if is_lean:
        with quiet():
            _make_lean(program.model)
    model: onnx.ModelProto = program.model_proto
    _name_all(model)
    give_own_zero_points(model)
    return model


def _make_lean(model: Any) -> None:
    from octavo.runtimes.onnx_concat import concatenate_integers
    from octavo.runtimes.onnx_layout import keep_channels_last
    from octavo.runtimes.onnx_shifts import take_shifts_off
    from octavo.runtimes.onnx_sums import means_by_products

    keep_channels_last(model)
    take_shifts_off(model)
    concatenate_integers(model)
    means_by_products(model)


@contextmanager
def patterns(denoiser: nn.Module, dialect: Dialect) -> Iterator[None]:
    """Within the block, layers with integer activations compute from operations that become patterns of ONNX.

    Other quantized layers compute with their weights in float, made beforehand.
    """
    layers, products = dict(quantized_layers(denoiser)), dict(quantized_products(denoiser))
    forwards: dict[nn.Module, Callable[..., Any]] = {
        layer: _forward_in_float(layer) if layer.input_spec.is_float else _forward_of(layer, dialect)
        for layer in layers.values()
    }
    forwards |= {product: _forward_of_product(product, dialect) for product in products.values()}
    with computing_by(forwards):
        yield
        for layer in layers.values():
            for name in (WEIGHT, BIAS):
                layer._buffers.pop(name, None)


def _forward_of(layer: QuantLayer, dialect: Dialect) -> Callable[[torch.Tensor], torch.Tensor]:
    scale = float(layer.input_scale)
    zero_point, signed = _representation(layer.input_spec, int(layer.input_zero_point), dialect)
    weight, ops = layer.weight_int8, operations()
    dims = weight.ndim - 2
    as_matmul = not dims or (dialect == "onnxruntime" and layer.groups == 1)
    if as_matmul and dims:
        weight = weight.movedim(1, -1).flatten(1)
    bias = None if layer.bias is None else layer.bias.detach().float()
    grouped = layer.timestep_factor is not None  # then the bias comes behind the rescaling
    if grouped:
        bias = None
    layer.register_buffer(WEIGHT, (weight.t() if as_matmul else weight).contiguous())
    layer.register_buffer(BIAS, -bias if as_matmul and bias is not None else bias)

    def kernel(x: torch.Tensor) -> Any:
        if layer.input_spec.bits < KERNEL_BITS:
            x = x.clamp(*_ends(scale, int(layer.input_zero_point), layer.input_spec))
        operands = (getattr(layer, WEIGHT), layer.weight_scale, getattr(layer, BIAS))
        rounding = (scale, zero_point, signed)
        if not dims:
            return ops["linear"](x, *operands, *rounding)
        conv: Any = layer
        padding = _padding(conv)
        if conv.padding_mode != "zeros":
            x = torch.nn.functional.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
            padding = [0] * dims
        stride, dilation = list(conv.stride), list(conv.dilation)
        if as_matmul:
            size = list(conv.kernel_size)
            return ops["columns"](x, *operands, *rounding, size, stride, padding, dilation)
        return ops["convolution"](x, *operands, *rounding, stride, padding, dilation, conv.groups)

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = layer.rescaled(kernel(layer.quantizer_input(x).float()))
        return y + layer.bias.float().view(-1, *[1] * dims) if grouped and layer.bias is not None else y

    return forward


def _forward_in_float(layer: QuantLayer) -> Callable[[torch.Tensor], torch.Tensor]:
    layer.register_buffer(WEIGHT, layer.stored_weight())
    of_output = (-1, *[1] * (layer.weight_int8.ndim - 2))

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = layer.rescaled(layer.accumulate(layer.quantizer_input(x).float(), getattr(layer, WEIGHT)))
        return y if layer.bias is None else y + layer.bias.float().view(of_output)

    return forward


def _padding(layer: Any) -> list[int]:
    if layer.padding == "valid":
        return [0] * len(layer.kernel_size)
    if layer.padding == "same":
        whole = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        if any(width % 2 for width in whole):
            raise OctavoError('padding: "same" of an even kernel is not exported to ONNX; exclude the layer')
        return [width // 2 for width in whole]
    return list(layer.padding)


def _forward_of_product(product: QuantProduct, dialect: Dialect) -> Callable[..., torch.Tensor]:
    operands = (
        (float(product.left_scale), product.left_spec),
        (float(product.right_scale), product.right_spec),
    )
    zero_points, signed = zip(*(_representation(spec, 0, dialect) for _, spec in operands), strict=True)
    scales = [scale for scale, _ in operands]

    def forward(left: torch.Tensor, right: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        read = [
            x.float().clamp(*_ends(scale, 0, spec)) if spec.bits < KERNEL_BITS else x.float()
            for x, (scale, spec) in zip((left, right), operands, strict=True)
        ]
        y: torch.Tensor = operations()["product"](*read, *scales, *zero_points, *signed)
        return y if factor == 1 else y * factor

    return forward


def _representation(spec: QuantSpec, zero_point: int, dialect: Dialect) -> tuple[int, bool]:
    """Zero point and signedness of the 8-bit integers that hold the spec's.

    In ONNX Runtime's dialect int8 is moved up to uint8; elsewhere unsigned integers that fit into int8 are put there.
    """
    if dialect == "onnxruntime":
        return (zero_point + 128 if spec.symmetric else zero_point), False
    return zero_point, spec.symmetric or (spec.qmax <= 127 and zero_point == 0)


def _ends(scale: float, zero_point: int, spec: QuantSpec) -> tuple[float, float]:
    return scale * (spec.qmin - zero_point), scale * (spec.qmax - zero_point)


def _name_all(model: onnx.ModelProto) -> None:
    """Name the dynamic dimension, the nodes after their modules, and what each product of attention writes.

    Products have no initializer to tell them by. torch's notes on where each node came from are left out.
    """
    graph, renamed = model.graph, {}
    for node in graph.node:
        scope, call = _scope(node)
        node.name = f"{scope}/{node.name}" if scope else node.name
        if node.op_type == "MatMul" and call.startswith("qdq_product"):
            renamed[node.output[0]] = f"{scope}.{PRODUCT}"
        del node.metadata_props[:]
    for node in graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = renamed.get(name, name)
    rows = {port.type.tensor_type.shape.dim[0].dim_param for port in graph.input} - {""}
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = renamed.get(value.name, value.name)
        del value.metadata_props[:]
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in rows:
                dimension.dim_param = ROWS
    for initializer in graph.initializer:
        del initializer.metadata_props[:]
    del graph.metadata_props[:], model.metadata_props[:]
    graph.name, model.producer_name = "octavo", "octavo"


def _scope(node: onnx.NodeProto) -> tuple[str, str]:
    """The dotted name of the module that a node came from, and the operation in it."""
    notes = {entry.key: entry.value for entry in node.metadata_props}
    scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))
    return (scopes[-2], scopes[-1]) if len(scopes) > 1 else ("", "")


def layer_prefix(layer: str) -> str:
    """What the names of a layer's initializers begin with."""
    return f"{OWNER}{layer}."


def save_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Write the graph as `path`; what would not fit in one file of 2 GB has its weights in `weights.bin` beside it."""
    import onnx

    apart = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > LARGEST
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(model, path, save_as_external_data=apart, location="weights.bin")

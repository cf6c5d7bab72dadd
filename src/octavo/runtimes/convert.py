"""From a torch denoiser to an OpenVINO graph whose layers with integer activations carry their int8 constants."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from octavo.diffusion import call_arguments
from octavo.errors import OctavoError
from octavo.quantization import (
    QuantLayer,
    QuantLinear,
    QuantProduct,
    QuantSpec,
    quantized_layers,
    quantized_products,
)
from octavo.runtimes.calls import Call, tensors_of
from octavo.runtimes.complex_pairs import ComplexAsPairs
from octavo.runtimes.held import RefusingToRead
from octavo.runtimes.network import computing_by, has_foreign_code
from octavo.runtimes.pointwise import as_kernel, by_pixels
from octavo.runtimes.saturation import halves
from octavo.runtimes.time_table import SOME_ROWS
from octavo.runtimes.tried_trace import tried

if TYPE_CHECKING:
    import openvino

TRACE_ROWS = 2
"""Rows of the traced example: one row would let the trace take broadcasts for copies."""

UNKNOWN = re.compile(r"(?:Conversion is failed for|No conversion rule found for operations): *(.+)")
"""How the converter ends its report: with the operations that it failed on, and those that it has never heard of."""

KERNEL_BITS = 8
"""Bits of the integers that the engine's kernels read."""


class Traceable(nn.Module):
    """The denoiser as a function of tensors alone, returning a tuple of tensors.

    `pairs`: whether its complex tensors are pairs of real ones, for a converter that knows none. `within`: makes the
    context that it is called in.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        call: Call,
        pairs: bool = True,
        within: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.call = call
        self.pairs = pairs
        self.within = within

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with (
            RefusingToRead(type(self.denoiser).__name__, self.call.names, tensors),
            self.within(),
            ComplexAsPairs() if self.pairs else nullcontext(),
        ):
            return tuple(
                tensors_of(self.denoiser(**call_arguments(self.denoiser, self.call.kwargs(tensors))))
            )


class FixedRows(OctavoError):
    """The network makes constants of the number of rows: a graph of it is for one number of rows."""


def to_openvino(
    denoiser: nn.Module,
    call: Call,
    split: Collection[str] = (),
    rows: int | None = None,
    pointwise: bool = False,
    needs_evaluation: bool | None = None,
) -> openvino.Model:
    """Convert `denoiser`, as `call` calls it, to a graph with a dynamic number of rows.

    `rows`: `call.rows`, for a graph that is for so many alone. Without it `FixedRows` is raised for a network of which
    no other can be made. Raises `OctavoError` for one with operations that OpenVINO's converter does not know.

    Each layer with integer activations becomes FakeQuantize (activation, per tensor) -> Convolution or MatMul with
    Multiply(Convert(int8 constant), scale per channel): the pattern that OpenVINO's low-precision passes turn
    into one integer kernel. The int8 constants are handed over as they are; nothing is folded from fp32.

    Activations that stay float meet a float Convolution or MatMul, whose constant is dequantized beforehand: of an
    int8 one the engine would take leave to round the activations too, by scales of its own.

    Engines have kernels for 8-bit integers (`KERNEL_BITS`). Fewer activation bits are 8-bit ones of which a part is
    used: the activation is cut off at the ends of its own range, (qmin - z) s and (qmax - z) s, and then rounded on the
    8-bit grid of the same s and z. The integers are the same, and so is the kernel.

    `split`: the layers that take two kernels, each with one part of the weights (`octavo.runtimes.saturation`).
    `pointwise`: whether linear layers become convolutions of one pixel (`octavo.runtimes.pointwise`).
    `needs_evaluation`: whether to evaluate the network while it is traced; None: if it has code of the user's own.
    A product of attention becomes FakeQuantize, FakeQuantize -> MatMul, in the same way.
    Of a layer with scales by timestep, a factor from a table, gathered by the graph's own timestep, is multiplied with
    what the FakeQuantize reads, and its reciprocal with what the kernel gives.

    Nodes are named after the layers: `__module.denoiser.<layer name>/aten::...`.
    """
    from openvino.frontend import OpConversionFailure

    if needs_evaluation is None:
        needs_evaluation = has_foreign_code(denoiser)
    with torch.inference_mode(), integer_constants(denoiser, split, pointwise), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            tensors = call.batched(TRACE_ROWS) if rows is None else call.tensors
            model = from_trace(_traced(denoiser, call, tensors, needs_evaluation))
        except OpConversionFailure as error:
            unknown = ", ".join(UNKNOWN.findall(str(error)))
            raise refusal(denoiser, f"convert {unknown or 'it'}") from error
        except RuntimeError as error:  # of the decoder, around whatever the network raised
            if isinstance(error.__cause__, OctavoError):
                raise error.__cause__ from None
            raise refusal(denoiser, f"trace it ({first_line(error.__cause__ or error)})") from error
    try:
        if rows is None:
            _reshape(model.clone(), call, SOME_ROWS)
        _reshape(model, call, -1 if rows is None else rows)
    except RuntimeError as error:
        raise FixedRows(
            f"{type(denoiser).__name__}: its graph is for {rows or TRACE_ROWS} rows alone; give a batch size"
        ) from error
    for port, name in zip(model.inputs, call.names, strict=True):
        port.get_tensor().set_names({name})
    return model


def _traced(
    denoiser: nn.Module, call: Call, tensors: tuple[torch.Tensor, ...], needs_evaluation: bool
) -> Any:
    """OpenVINO's decoder of a trace, for which the network is not evaluated unless it needs to be."""
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    def traced(within: Callable[[], AbstractContextManager[None]] = nullcontext) -> Any:
        network = Traceable(denoiser, call, within=within)
        return TorchScriptPythonDecoder(network, example_input=tensors, trace_kwargs={"check_trace": False})

    decoder = None if needs_evaluation else tried(denoiser, traced)
    return traced() if decoder is None else decoder


def from_trace(decoder: Any) -> openvino.Model:
    """What `openvino.convert_model` makes of a module, step by step.

    Without its check of the trace, which evaluates the network over and over, and without doing the transformations
    twice (2026.4).
    """
    from openvino._offline_transformations import apply_moc_transformations
    from openvino.frontend import FrontEndManager

    frontend = FrontEndManager().load_by_framework("pytorch")
    model = frontend.convert(frontend.load(decoder))
    apply_moc_transformations(model, cf=False, smart_reshape=True)
    return model


def refusal(denoiser: nn.Module, what: str) -> OctavoError:
    """The error for a network that OpenVINO cannot do something with."""
    return OctavoError(
        f"{type(denoiser).__name__}: OpenVINO cannot {what}; sample it in torch, without accelerate (--runtime torch)"
    )


def first_line(error: BaseException) -> str:
    """
    >>> first_line(RuntimeError("Exception from core.cpp:117: shapes\\ndo not fit"))
    'Exception from core.cpp:117: shapes'
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _reshape(model: openvino.Model, call: Call, rows: int) -> None:
    import openvino

    shapes = ([rows if size == -1 else size for size in shape] for shape in call.row_dynamic_shapes())
    model.reshape(
        {port: openvino.PartialShape(shape) for port, shape in zip(model.inputs, shapes, strict=True)}
    )


@contextmanager
def integer_constants(
    denoiser: nn.Module, split: Collection[str] = (), pointwise: bool = False
) -> Iterator[None]:
    """Within the block, quantized layers compute from operations that OpenVINO's converter keeps in integers.

    What depends on no input and is small is computed beforehand: nodes fewer in a graph that the converter goes over
    again and again.
    """
    layers, products = dict(quantized_layers(denoiser)), dict(quantized_products(denoiser))
    forwards: dict[nn.Module, Callable[..., Any]] = {
        **{layer: _forward_of(layer, name in split, pointwise) for name, layer in layers.items()},
        **{product: _forward_of_product(product) for product in products.values()},
    }
    with computing_by(forwards):
        yield


def _forward_of(layer: QuantLayer, split: bool, pointwise: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    if layer.input_spec.is_float:
        return _forward_in_float(layer)
    scale, zero_point = float(layer.input_scale), int(layer.input_zero_point)
    steps = layer.weight_scale.view(-1, *[1] * (layer.weight_int8.ndim - 1))
    parts = [(layer.weight_int8, steps)]
    if split:
        high, low = halves(layer.weight_int8)
        parts = [(high, 2 * steps), (low, steps)]
    bias = _bias(layer)
    product = sum_of(layer, parts, bias, layer.accumulate)
    if pointwise and type(layer) is QuantLinear:
        kernels = [(as_kernel(integers), as_kernel(step)) for integers, step in parts]
        of_pixels = sum_of(layer, kernels, None if bias is None else as_kernel(bias), F.conv2d)
        product = by_pixels(of_pixels, product)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return product(rounded(_in_float32(layer.quantizer_input(x)), scale, zero_point, layer.input_spec))

    return forward


def sum_of(
    layer: QuantLayer,
    parts: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    bias: torch.Tensor | None,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer's output of what is rounded already, by `product` with each part: integers and their steps, or a float
    weight and None."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        sums = [
            product(x, weight if step is None else weight.to(torch.float32) * step) for weight, step in parts
        ]
        y = layer.rescaled(sums[0] if len(sums) == 1 else sums[0] + sums[1])
        return y if bias is None else y + bias

    return forward


def _forward_in_float(layer: QuantLayer) -> Callable[[torch.Tensor], torch.Tensor]:
    weight, bias = layer.stored_weight(), _bias(layer)

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = layer.rescaled(layer.accumulate(_in_float32(layer.quantizer_input(x)), weight))
        return y if bias is None else y + bias

    return forward


def _bias(layer: QuantLayer) -> torch.Tensor | None:
    """In float32, in the shape in which it is added to an output."""
    if layer.bias is None:
        return None
    return layer.bias.detach().float().view(-1, *[1] * (layer.weight_int8.ndim - 2))


def _in_float32(x: torch.Tensor) -> torch.Tensor:
    """`x.float()`, which a trace would record of a float32 tensor too."""
    return x if x.dtype == torch.float32 else x.float()


def _forward_of_product(product: QuantProduct) -> Callable[..., torch.Tensor]:
    left_scale, right_scale = float(product.left_scale), float(product.right_scale)

    def forward(left: torch.Tensor, right: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        left = rounded(_in_float32(left), left_scale, 0, product.left_spec)
        right = rounded(_in_float32(right), right_scale, 0, product.right_spec)
        y = left @ right
        return y if factor == 1 else y * factor

    return forward


def rounded(x: torch.Tensor, scale: float, zero_point: int, spec: QuantSpec) -> torch.Tensor:
    """One FakeQuantize of `KERNEL_BITS`, of which fewer bits are a part."""
    kernel = replace(spec, bits=KERNEL_BITS)
    if spec.bits < kernel.bits:
        x = x.clamp(*(scale * (end - zero_point) for end in (spec.qmin, spec.qmax)))
    return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, kernel.qmin, kernel.qmax)

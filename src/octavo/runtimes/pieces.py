"""Layers whose output is cut into pieces, by a kernel for each piece, while a network is traced.

A sub-pixel convolution (`octavo.quantization.sub_pixel`) has a piece for each of the four places of a block, and as one
kernel computes a row and a column too many for every place; a gated activation (GEGLU, 2002.05202) has one half that
gates the other. Kernels of their own give what is needed where it is needed, and no tensor is copied apart. The results
are the same integers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from octavo.quantization import QuantLayer, QuantLinear, SubPixelUpsample2D
from octavo.quantization.sub_pixel import PLACES, interleaved, missing
from octavo.runtimes.audit import layers_named_in
from octavo.runtimes.convert import rounded, sum_of
from octavo.runtimes.network import computing_by
from octavo.runtimes.pointwise import as_kernel, by_pixels
from octavo.runtimes.saturation import halves

if TYPE_CHECKING:
    import openvino

PADDING = [(1 - b, b, 1 - a, a) for _, a, b in PLACES]
"""Left, right, top, bottom: a place reads from one above to the last row, or from the first to one below."""


@contextmanager
def kernels_by_piece(
    network: nn.Module, split: Collection[str] = (), pointwise: bool = False
) -> Iterator[None]:
    """Within the block, quantized sub-pixel convolutions and gated activations compute so.

    Modules whose `forward` was set by somebody else are left as they are; upsampling to an odd size goes its plain way.
    `split`: the layers that take two integer kernels each (`octavo.runtimes.saturation`). Of these, sub-pixel
    convolutions go their plain way too: OpenVINO makes one padding of the two kernels', and then fuses it into neither.
    `pointwise`: gated activations by convolutions of one pixel (`octavo.runtimes.pointwise`).
    """
    from diffusers.models.activations import GEGLU

    names = {module: name for name, module in network.named_modules()}
    changed: dict[nn.Module, Callable[..., Any]] = {}
    for module, layer in _of_pieces(network):
        if "forward" in vars(module):
            continue
        if isinstance(module, SubPixelUpsample2D):
            if names[layer] not in split:
                changed[module] = _upsampling(module, layer)
        else:
            activation: Any = module.gelu if type(module) is GEGLU else module.activation
            changed[module] = _gated(activation, layer, names[layer] in split, pointwise)
    with computing_by(changed):
        yield


def kernels_in_pieces(model: openvino.Model, network: nn.Module) -> dict[str, int]:
    """How many kernels the layers have that may be in pieces.

    As many as `model`, converted and not yet compiled, has operations named after each.
    """
    names = {module: name for name, module in network.named_modules()}
    of_pieces = {names[layer] for _, layer in _of_pieces(network)}
    found = [
        layer
        for node in model.get_ordered_ops()
        if node.get_type_name() in ("Convolution", "MatMul")
        for layer in layers_named_in(node.get_friendly_name())
    ]
    return {name: found.count(name) for name in of_pieces if name in found}


def _of_pieces(network: nn.Module) -> Iterator[tuple[Any, QuantLayer]]:
    """Modules that are written anew, each with its quantized layer."""
    from diffusers.models.activations import GEGLU, SwiGLU

    for module in network.modules():
        if isinstance(module, SubPixelUpsample2D):
            layer = getattr(module, module.layer)
            if isinstance(layer, QuantLayer):
                yield module, layer
        elif type(module) in (GEGLU, SwiGLU) and type(module.proj) is QuantLinear:
            yield module, module.proj


def _upsampling(upsample: SubPixelUpsample2D, layer: QuantLayer) -> Callable[..., torch.Tensor]:
    plain, by_place = type(upsample).forward.__get__(upsample), _in_pieces(layer, False, 4, _convolution)

    def forward(x: torch.Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        if any(missing(x, output_size)):
            result: torch.Tensor = plain(x, output_size)
            return result
        return interleaved(_called(layer, by_place, x))

    return forward


def _gated(
    activation: Callable[[torch.Tensor], torch.Tensor], layer: QuantLayer, split: bool, pointwise: bool
) -> Callable[..., torch.Tensor]:
    by_half = _in_pieces(layer, split, 2, lambda x, weight, piece: F.linear(x, weight), pointwise)

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        values, gate = _called(layer, by_half, x)
        return values * activation(gate)

    return forward


def _convolution(x: torch.Tensor, weight: torch.Tensor, piece: int) -> torch.Tensor:
    return F.conv2d(F.pad(x, PADDING[piece]), weight)


def _called(layer: Any, forward: Callable[..., Any], x: torch.Tensor) -> list[torch.Tensor]:
    """`forward(x)` as a call of the layer: nodes are named by the module that is called."""
    own = vars(layer).get("forward")
    layer.forward = forward
    try:
        results: list[torch.Tensor] = layer(x)
        return results
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own


def _in_pieces(
    layer: QuantLayer,
    split: bool,
    count: int,
    kernel: Callable[..., torch.Tensor],
    pointwise: bool = False,
) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """The layer's output in `count` equal pieces of its channels, each by `kernel(input, weight, piece)`.

    `pointwise`: a linear layer's as convolutions of one pixel, unless its activations stay float.
    """
    in_float, dims = layer.input_spec.is_float, layer.weight_int8.ndim
    scale, zero_point = float(layer.input_scale), int(layer.input_zero_point)
    weights: Sequence[tuple[torch.Tensor, int]] = [(layer.weight_int8, 1)]
    if in_float:
        weights = [(layer.stored_weight(), 1)]
    elif split:
        high, low = halves(layer.weight_int8)
        weights = [(high, 2), (low, 1)]

    def pieces(tensor: torch.Tensor, ndim: int) -> list[torch.Tensor]:
        """Cut before the trace, so that each is a constant."""
        return [
            piece.clone().view(-1, *piece.shape[1:], *[1] * (ndim - piece.ndim))
            for piece in tensor.chunk(count)
        ]

    kernels = [[(part, factor) for part in pieces(weight, dims)] for weight, factor in weights]
    scales = pieces(layer.weight_scale, dims)
    biases = None if layer.bias is None else pieces(layer.bias.detach().float(), dims - 1 if dims > 2 else 1)

    def by(
        kernel: Callable[..., torch.Tensor],
        kernels: list[list[tuple[torch.Tensor, int]]],
        scales: list[torch.Tensor],
        biases: list[torch.Tensor] | None,
    ) -> Callable[[torch.Tensor], list[torch.Tensor]]:
        sums = [
            sum_of(
                layer,
                [(parts[i][0], None if in_float else parts[i][1] * scales[i]) for parts in kernels],
                None if biases is None else biases[i],
                functools.partial(kernel, piece=i),
            )
            for i in range(count)
        ]
        return lambda x: [of_piece(x) for of_piece in sums]

    product = by(kernel, kernels, scales, biases)
    if pointwise and not in_float:
        of_pixels = by(
            lambda x, weight, piece: F.conv2d(x, weight),
            [[(as_kernel(part), factor) for part, factor in parts] for parts in kernels],
            [as_kernel(scale) for scale in scales],
            None if biases is None else [as_kernel(bias) for bias in biases],
        )
        product = by_pixels(of_pixels, product)

    def forward(x: torch.Tensor) -> list[torch.Tensor]:
        x = layer.quantizer_input(x).float()
        return product(x if in_float else rounded(x, scale, zero_point, layer.input_spec))

    return forward

"""Sub-pixel convolutions by four kernels, one for each place of a block, while a network is traced.

As one convolution (`octavo.quantization.sub_pixel`) they compute a row and a column too many for every place, and copy
what is left: a tenth of their time. Results are the same integers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from octavo.quantization import QuantLayer, SubPixelUpsample2D
from octavo.quantization.sub_pixel import PLACES, interleaved, missing
from octavo.runtimes.convert import rounded
from octavo.runtimes.saturation import halves


@contextmanager
def kernels_by_place(network: nn.Module, split: Collection[str] = ()) -> Iterator[None]:
    """Within the block, quantized sub-pixel convolutions compute so, but those of outputs of an odd size."""
    changed: list[nn.Module] = []
    for name, module in network.named_modules():
        if isinstance(module, SubPixelUpsample2D) and "forward" not in vars(module):
            layer = getattr(module, module.layer)
            if isinstance(layer, QuantLayer):
                module.forward = _forward(module, layer, f"{name}.{module.layer}" in split)  # type: ignore[method-assign]
                changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _forward(upsample: SubPixelUpsample2D, layer: Any, split: bool) -> Callable[..., torch.Tensor]:
    plain, by_place = type(upsample).forward.__get__(upsample), _forward_of_places(layer, split)

    def forward(
        hidden_states: torch.Tensor, output_size: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if any(missing(hidden_states, output_size)):
            result: torch.Tensor = plain(hidden_states, output_size)
            return result
        own = layer.forward
        layer.forward = by_place  # nodes are named by the module that is called
        try:
            return interleaved(layer(hidden_states))
        finally:
            layer.forward = own

    return forward


def _forward_of_places(layer: QuantLayer, split: bool) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """A sub-pixel convolution's results of each place of a block, `[N, D, H, W]`, each by a kernel of its own.

    A place reads rows from one above to the last, or from the first to one below, and columns alike: its kernel pads
    by that, instead of a common one that gives all places a row and a column that they do not need.
    """
    in_float = layer.input_spec.is_float
    scale, zero_point = float(layer.input_scale), int(layer.input_zero_point)
    weights: list[tuple[torch.Tensor, int]] = [(layer.weight_int8, 1)]
    if in_float:
        weights = [(layer.stored_weight(), 1)]
    elif split:
        high, low = halves(layer.weight_int8)
        weights = [(high, 2), (low, 1)]

    def rows(tensor: torch.Tensor, place: int) -> torch.Tensor:
        return tensor.chunk(4)[place].clone()  # before the trace, so that each is a constant

    kernels = [[(rows(part, place), factor) for part, factor in weights] for place, _, _ in PLACES]
    scales = [rows(layer.weight_scale, place).view(-1, 1, 1, 1) for place, _, _ in PLACES]
    biases = [
        None if layer.bias is None else rows(layer.bias.detach().float(), place).view(-1, 1, 1)
        for place, _, _ in PLACES
    ]

    def forward(x: torch.Tensor) -> list[torch.Tensor]:
        x = layer.quantizer_input(x).float()
        if not in_float:
            x = rounded(x, scale, zero_point, layer.input_spec)
        results = []
        for place, a, b in PLACES:
            padded = F.pad(x, (1 - b, b, 1 - a, a))
            sums = [
                F.conv2d(padded, part if in_float else part.to(torch.float32) * (factor * scales[place]))
                for part, factor in kernels[place]
            ]
            y, bias = layer.rescaled(sums[0] if len(sums) == 1 else sums[0] + sums[1]), biases[place]
            results.append(y if bias is None else y + bias)
        return results

    return forward

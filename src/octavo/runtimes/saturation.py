"""CPUs whose int8 kernels add in 16 bits: how they are told, and how a layer's sums stay exact there.

Without VNNI (AMD before Zen 4, Intel before Ice Lake and many clients of theirs), the kernels multiply u8 by s8 and add
PAIRS of products into a signed 16-bit number that saturates (`vpmaddubsw`), before they go on in 32 bits:

    |q1 w1 + q2 w2| <= 32767   holds for all q in [0, 255] only if two weights of one sign add up to at most 128

So 8-bit weights give wrong sums there, by 10 to 50 % where both ranges are used to their ends, with no word from the
engine. Weights of at most 7 bits never do, nor do 8-bit ones that were rounded within the limit of the pairs that the
kernels take (`octavo.quantization.pairs`). Any other 8-bit weight is cut in two, w = 2 h + l with h in [-64, 63] and
l in {-1, 0, 1}: two integer kernels on the same input, whose sums are exact, in twice the time of one (docs/log.md,
2026-11-25).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from octavo.quantization import QuantLayer
from octavo.quantization.pairs import PAIR_SUM, breaks_limit, has_pairs
from octavo.runtimes.core import openvino_core

SOME = 16
"""Of so many weights one is looked at first: nearly every 8-bit layer of some width is told by these."""


@cache
def adds_in_16_bits() -> bool:
    """Whether this machine's engine gets the sums of 8-bit products wrong: measured, not told by the CPU's name.

    Convolutions and a matmul are evaluated at the ends of both ranges, 255 times 127 and 255 times -127.
    """
    return not all(_are_exact([np.full(shape, weight) for shape in _SHAPES]) for weight in (127, -127))


@cache
def adds_neighbours() -> bool:
    """Whether its sums are exact of weights whose neighbours keep the limit of pairs: measured, likewise.

    127 and 1, 126 and 2 ... of either sign and in either order, drawn: in any other order of adding most overflow.
    """
    random = np.random.default_rng(0)

    def drawn(shape: tuple[int, ...]) -> NDArray[Any]:
        first = random.choice([1, 2, 4, 124, 126, 127], (shape[0], shape[1] // 2, 1, *shape[2:]))
        pairs = np.concatenate([first, PAIR_SUM - first], axis=2)
        return (pairs * random.choice([-1, 1], first.shape)).reshape(shape)

    return _are_exact([drawn(shape) for shape in _SHAPES])


def may_saturate(layer: QuantLayer, by_neighbours: bool) -> bool:
    """Whether some pair of the layer's weights can overflow 16 bits.

    `by_neighbours`: kernels add the products of input channels 2 i and 2 i + 1 (of their group), where a layer has such
    pairs (`has_pairs`). Else any two weights of an output channel may be a pair: looked at are its two largest and its
    two smallest.
    """
    weight = layer.weight_int8
    if by_neighbours and has_pairs(weight.shape):
        return breaks_limit(weight)
    weight = weight.flatten(1)
    return _may_saturate(weight[:, ::SOME]) or _may_saturate(weight)


def _may_saturate(weight: torch.Tensor) -> bool:
    if weight.shape[1] < 2:
        return False
    weight = weight.to(torch.int16)
    pairs = weight.topk(2).values.sum(1), weight.topk(2, largest=False).values.sum(1)
    return bool((pairs[0] > PAIR_SUM).any() or (pairs[1] < -PAIR_SUM).any())


def layers_to_split(layers: Iterable[tuple[str, QuantLayer]]) -> list[str]:
    """The names of the layers that this machine's engine runs exactly only in two kernels."""
    layers = [(name, layer) for name, layer in layers if not layer.input_spec.is_float]
    if not layers or not adds_in_16_bits():
        return []
    return [name for name, layer in layers if may_saturate(layer, adds_neighbours())]


def halves(weight_int8: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 h in [-64, 63] and l in {-1, 0, 1}, of the same shape, with w = 2 h + l.

    >>> halves(torch.tensor([-128, -127, -1, 0, 126, 127], dtype=torch.int8))
    (tensor([-64, -63,   0,   0,  63,  63], dtype=torch.int8), tensor([ 0, -1, -1,  0,  0,  1], dtype=torch.int8))
    """
    high = weight_int8.div(2, rounding_mode="trunc")
    return high, weight_int8 - 2 * high


_SHAPES = ((16, 32, 3, 3), (16, 40, 2, 2), (24, 64, 1, 1), (16, 32), (5, 300), (8, 1532))
"""Weights of convolutions and matmuls that are probed, on all threads: widths that fill the kernels' registers, others,
and such as are cut in two or between threads."""
_SIDE = 6


def _are_exact(weights: list[NDArray[Any]]) -> bool:
    """Whether the engine multiplies inputs that are all 255 with weights `[C, inputs, ...]` to the true sums.

    Each has a product of its own in one graph: compiling many costs several times what one does.
    """
    import openvino
    from openvino import opset13 as ops

    inputs, products = [], []
    for weight in weights:
        convolution = weight.ndim == 4
        x = ops.parameter([1, weight.shape[1], _SIDE, _SIDE] if convolution else [_SIDE, weight.shape[1]])
        ends = [np.float32(end) for end in (0, 255, 0, 255)]
        quantized = ops.fake_quantize(x, *ends, levels=256)
        constant = ops.convert(ops.constant(weight.astype(np.int8)), "f32")
        ones = np.ones((len(weight), *[1] * (weight.ndim - 1)), np.float32)
        scaled = ops.multiply(constant, ops.constant(ones))
        if convolution:
            y = ops.convolution(quantized, scaled, [1, 1], [0, 0], [0, 0], [1, 1])
        else:
            y = ops.matmul(quantized, scaled, False, True)
        inputs.append(x)
        products.append(y)
    compiled = openvino_core().compile_model(
        openvino.Model(products, inputs), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    sums = compiled([np.full(list(x.shape), 255, np.float32) for x in inputs])
    return all(_is_sum_of(weight, sums[i]) for i, weight in enumerate(weights))


def _is_sum_of(weight: NDArray[Any], sums: NDArray[Any]) -> bool:
    true = 255.0 * weight.reshape(len(weight), -1).sum(axis=1)
    true = true[:, None, None] if weight.ndim == 4 else true
    return np.array_equal(sums, np.broadcast_to(true, sums.shape))

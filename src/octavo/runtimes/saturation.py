"""CPUs whose int8 kernels add in 16 bits: how they are told, and how a layer's sums stay exact there.

Without VNNI (AMD before Zen 4, Intel before Ice Lake and many clients of theirs), the kernels multiply u8 by s8 and add
PAIRS of products into a signed 16-bit number that saturates (`vpmaddubsw`), before they go on in 32 bits:

    |q1 w1 + q2 w2| <= 32767   holds for all q in [0, 255] only if two weights of one sign add up to at most 128

So 8-bit weights give wrong sums there, by 10 to 50 % where both ranges are used to their ends, with no word from the
engine. Weights of at most 7 bits never do. An 8-bit weight is cut in two, w = 2 h + l with h in [-64, 63] and l in
{-1, 0, 1}: two integer kernels on the same input, whose sums are exact, in twice the time of one (docs/log.md,
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

SAFE_SUM = 128
"""Two weights of one sign that add up to no more cannot overflow 16 bits, whatever they are multiplied with."""
SOME = 16
"""Of so many weights one is looked at first: nearly every 8-bit layer of some width is told by these."""


@cache
def adds_in_16_bits() -> bool:
    """Whether this machine's engine gets the sums of 8-bit products wrong: measured, not told by the CPU's name.

    A convolution and a matmul are evaluated at the ends of both ranges, 255 times 127 and 255 times -127.
    """
    return any(
        not np.array_equal(_engine_sums(kind, weight), _true_sums(kind, weight))
        for kind in ("convolution", "matmul")
        for weight in (127, -127)
    )


def may_saturate(layer: QuantLayer) -> bool:
    """Whether some pair of the layer's weights can overflow 16 bits, in whatever order the kernel takes them.

    Looked at are the two largest and the two smallest weights of each output channel.
    """
    weight = layer.weight_int8.flatten(1)
    return _may_saturate(weight[:, ::SOME]) or _may_saturate(weight)


def _may_saturate(weight: torch.Tensor) -> bool:
    if weight.shape[1] < 2:
        return False
    weight = weight.to(torch.int16)
    pairs = weight.topk(2).values.sum(1), weight.topk(2, largest=False).values.sum(1)
    return bool((pairs[0] > SAFE_SUM).any() or (pairs[1] < -SAFE_SUM).any())


def layers_to_split(layers: Iterable[tuple[str, QuantLayer]]) -> list[str]:
    """The names of the layers that this machine's engine runs exactly only in two kernels."""
    layers = [(name, layer) for name, layer in layers if not layer.input_spec.is_float]
    return [name for name, layer in layers if may_saturate(layer)] if layers and adds_in_16_bits() else []


def halves(weight_int8: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 h in [-64, 63] and l in {-1, 0, 1}, of the same shape, with w = 2 h + l.

    >>> halves(torch.tensor([-128, -127, -1, 0, 126, 127], dtype=torch.int8))
    (tensor([-64, -63,   0,   0,  63,  63], dtype=torch.int8), tensor([ 0, -1, -1,  0,  0,  1], dtype=torch.int8))
    """
    high = weight_int8.div(2, rounding_mode="trunc")
    return high, weight_int8 - 2 * high


_CHANNELS, _OUTPUTS, _SIDE = 32, 16, 6


def _engine_sums(kind: str, weight: int) -> NDArray[Any]:
    """What the engine makes of inputs that are all 255 and weights that are all `weight`."""
    import openvino
    from openvino import opset13 as ops

    convolution = kind == "convolution"
    shape = (_OUTPUTS, _CHANNELS, 3, 3) if convolution else (_OUTPUTS, _CHANNELS)
    x = ops.parameter([1, _CHANNELS, _SIDE, _SIDE] if convolution else [_SIDE, _CHANNELS])
    ends = [np.float32(end) for end in (0, 255, 0, 255)]
    quantized = ops.fake_quantize(x, *ends, levels=256)
    constant = ops.convert(ops.constant(np.full(shape, weight, np.int8)), "f32")
    scaled = ops.multiply(constant, ops.constant(np.ones((_OUTPUTS, *[1] * (len(shape) - 1)), np.float32)))
    if convolution:
        y = ops.convolution(quantized, scaled, [1, 1], [0, 0], [0, 0], [1, 1])
    else:
        y = ops.matmul(quantized, scaled, False, True)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(openvino.Model([y], [x]), "CPU", settings)
    return np.array(compiled(np.full(list(x.shape), 255, np.float32))[0])


def _true_sums(kind: str, weight: int) -> NDArray[Any]:
    products = _CHANNELS * (9 if kind == "convolution" else 1)
    shape = (1, _OUTPUTS, _SIDE - 2, _SIDE - 2) if kind == "convolution" else (_SIDE, _OUTPUTS)
    return np.full(shape, 255.0 * weight * products, np.float32)

"""The roofline of int8: how near an evaluation comes to what the machine's integer instructions can do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.runtimes.core import openvino_core

SIZES = (1024, 2048)
"""Rows, columns and depth of the products that the peak is measured with; which is faster depends on the caches."""

CHANNELS, SIDE = 256, 32
"""Of the 3 x 3 convolution beside them, in and out: without VNNI it is nearly twice as fast as they are."""

WEIGHTS = 64
"""The largest weight of these: 2 x 255 x 64 < 2^15."""

STEP = 0.02
"""Of the activations."""


def int8_peak(threads: int | None = None, *, rounds: int = 20, sizes: Sequence[int] = SIZES) -> float:
    """Multiply-adds a second of the machine's int8 kernels: the best of `rounds` products of two matrices of each size,
    and of as many convolutions.

    u8 times s8 with 32-bit sums, in OpenVINO's kernels: products are handed integers, convolutions float32, which they
    round first, and both write float32. A figure to compare with, not a bound: another shape may run faster.
    """
    of_convolution = CHANNELS**2 * 9 * SIDE**2
    return max(
        *(_rate(*_product(size, threads), size**3, rounds) for size in sizes),
        _rate(*_convolution(CHANNELS, SIDE, threads), of_convolution, rounds),
    )


def _rate(compiled: Any, activations: NDArray[Any], macs: int, rounds: int) -> float:
    request = compiled.create_infer_request()
    seconds = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        request.infer([activations], share_inputs=True, share_outputs=True)
        seconds.append(time.perf_counter() - start)
    return float(macs / min(seconds[2:]))


def share_of_peak(macs: int, seconds: list[float], peak: float) -> float:
    """macs / (median seconds x peak), where 1 is the machine's limit.

    >>> share_of_peak(500, [1.0, 2.0, 1.0], 1000.0)
    0.5
    """
    return macs / (statistics.median(seconds) * peak)


def _product(size: int, threads: int | None) -> tuple[Any, NDArray[Any]]:
    """A fully connected layer on u8 activations and s8 weights, compiled, and its input."""
    from openvino import opset13 as ops

    x = ops.parameter((size, size), np.uint8)
    activations = ops.multiply(ops.convert(x, np.float32), np.float32(STEP))
    return _compiled(x, ops.matmul(activations, _weights((size, size)), False, True), threads)


def _convolution(channels: int, side: int, threads: int | None) -> tuple[Any, NDArray[Any]]:
    """A 3 x 3 convolution likewise, on float32: of one on integers the engine makes a float kernel."""
    from openvino import opset13 as ops

    x = ops.parameter((1, channels, side, side), np.float32)
    ends = [np.float32(end) for end in (0, 255 * STEP, 0, 255 * STEP)]
    activations = ops.fake_quantize(x, *ends, levels=256)
    weights = _weights((channels, channels, 3, 3))
    return _compiled(x, ops.convolution(activations, weights, [1, 1], [1, 1], [1, 1], [1, 1]), threads)


def _weights(shape: tuple[int, ...]) -> Any:
    """Of 7 bits, so that the sums of 16 bits that CPUs without VNNI make of two products hold them."""
    from openvino import opset13 as ops

    integers = np.random.default_rng(0).integers(-WEIGHTS, WEIGHTS + 1, shape)
    return ops.multiply(ops.convert(ops.constant(integers.astype(np.int8)), np.float32), np.float32(0.01))


def _compiled(x: Any, y: Any, threads: int | None) -> tuple[Any, NDArray[Any]]:
    import openvino

    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = openvino_core().compile_model(openvino.Model([y], [x]), "CPU", settings)
    integers = np.random.default_rng(1).integers(0, 256, tuple(x.shape)).astype(np.uint8)
    is_float = x.get_element_type() == openvino.Type.f32
    return compiled, integers.astype(np.float32) * np.float32(STEP) if is_float else integers

"""The roofline of int8: how near an evaluation comes to what the machine's integer instructions can do."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from octavo.errors import OctavoError

PRODUCTS = ("FullyConnected", "MatMul")
"""What the names of OpenVINO's kernels of a product begin with."""

SIZES = (512, 1024, 2048)
"""Rows, columns and depth of the products that the peak is measured with; which is fastest depends on the caches."""

WEIGHTS = 64
"""The largest weight of those products: 2 x 255 x 64 < 2^15."""


def int8_peak(threads: int | None = None, *, rounds: int = 20, sizes: Sequence[int] = SIZES) -> float:
    """Multiply-adds a second of the machine's int8 kernel: the best of `rounds` products of two matrices of each size.

    u8 times s8 with 32-bit sums, the time of OpenVINO's fully connected kernel alone as the engine itself counts it,
    without the conversions around it. A figure to compare with, not a bound: another shape may run faster.
    """
    return max(_rate(size, threads, rounds) for size in sizes)


def _rate(size: int, threads: int | None, rounds: int) -> float:
    compiled, activations = _product(size, threads)
    request = compiled.create_infer_request()
    seconds = []
    for _ in range(rounds + 2):
        request.infer([activations], share_inputs=True, share_outputs=True)
        counted = [node for node in request.profiling_info if node.node_type.startswith(PRODUCTS)]
        seconds.append(sum(node.real_time.total_seconds() for node in counted))
    least = min(seconds[2:])
    if least <= 0:
        raise OctavoError(f"roofline: the engine counted no time for a product of {size} x {size} matrices")
    return float(size**3 / least)


def share_of_peak(macs: int, seconds: list[float], peak: float) -> float:
    """macs / (median seconds x peak), where 1 is the machine's limit.

    >>> share_of_peak(500, [1.0, 2.0, 1.0], 1000.0)
    0.5
    """
    return macs / (statistics.median(seconds) * peak)


def _product(size: int, threads: int | None) -> tuple[Any, Any]:
    """A fully connected layer on u8 activations and s8 weights, compiled, and its input.

    The weights are of 7 bits, so that the sums of 16 bits that CPUs without VNNI make of two products hold them.
    """
    import openvino
    from openvino import opset13 as ops

    random = np.random.default_rng(0)
    x = ops.parameter([size, size], np.float32)
    low, high = np.float32(0), np.float32(255)
    quantized = ops.fake_quantize(x, low, high, low, high, 256)
    integers = ops.constant(random.integers(-WEIGHTS, WEIGHTS + 1, (size, size)).astype(np.int8))
    weights = ops.multiply(ops.convert(integers, np.float32), np.float32(0.01))
    model = openvino.Model([ops.matmul(quantized, weights, False, True)], [x])
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "PERF_COUNT": True}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    return compiled, random.integers(0, 256, (size, size)).astype(np.float32)

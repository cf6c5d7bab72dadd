"""The roofline of int8: how near an evaluation comes to what the machine's integer instructions can do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

SIZES = (1024, 2048)
"""Rows, columns and depth of the products that the peak is measured with; which is faster depends on the caches."""

WEIGHTS = 64
"""The largest weight of those products: 2 x 255 x 64 < 2^15."""


def int8_peak(threads: int | None = None, *, rounds: int = 20, sizes: Sequence[int] = SIZES) -> float:
    """Multiply-adds a second of the machine's int8 kernel: the best of `rounds` products of two matrices of each size.

    u8 times s8 with 32-bit sums, in OpenVINO's fully connected kernel, which is handed integers and writes float32. A
    figure to compare with, not a bound: another shape may run faster.
    """
    return max(_rate(size, threads, rounds) for size in sizes)


def _rate(size: int, threads: int | None, rounds: int) -> float:
    compiled, activations = _product(size, threads)
    request = compiled.create_infer_request()
    seconds = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        request.infer([activations], share_inputs=True, share_outputs=True)
        seconds.append(time.perf_counter() - start)
    return float(size**3 / min(seconds[2:]))


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
    x = ops.parameter([size, size], np.uint8)
    activations = ops.multiply(ops.convert(x, np.float32), np.float32(0.02))
    integers = ops.constant(random.integers(-WEIGHTS, WEIGHTS + 1, (size, size)).astype(np.int8))
    weights = ops.multiply(ops.convert(integers, np.float32), np.float32(0.01))
    model = openvino.Model([ops.matmul(activations, weights, False, True)], [x])
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    return compiled, random.integers(0, 256, (size, size)).astype(np.uint8)

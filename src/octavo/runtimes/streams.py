"""A batch in equal parts, evaluated side by side: one stream, and its share of the threads, for each part."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from octavo.runtimes.calls import Call
from octavo.runtimes.core import openvino_core
from octavo.threads import torch_threads

if TYPE_CHECKING:
    import openvino

THREADS: ContextVar[int | None] = ContextVar("threads", default=None)
"""What engines take that are not told how many threads; None: all cores."""
CONVERTING = threading.RLock()
"""Held while a network is converted and compiled: tracing changes what torch shares between threads."""


@contextmanager
def limited_threads(threads: int) -> Iterator[None]:
    """Within the block torch computes with `threads` CPU threads, and so do engines that are made in it.

    An engine that is told its own `threads` takes those.
    """
    token = THREADS.set(threads)
    try:
        with torch_threads(threads):
            yield
    finally:
        THREADS.reset(token)


def equal_parts(rows: int, threads: int) -> int:
    """Into how many equal parts a batch of `rows` is cut: as many as divide both the rows and the threads.

    Threads that share one image wait for each other after every layer; threads that have images of their own do
    not. Two parts on two cores are 1.1 to 1.5 times faster than one (docs/log.md).

    >>> equal_parts(8, 2), equal_parts(6, 4), equal_parts(7, 2)
    (2, 2, 1)
    """
    return math.gcd(rows, threads)


@cache
def engine_threads(threads: int | None) -> int:
    """How many threads OpenVINO's CPU engine takes if asked for `threads`; None: all its cores."""
    import openvino

    nothing = openvino.opset13.parameter([1])
    settings: dict[str, Any] = {"NUM_STREAMS": 1}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = openvino_core().compile_model(openvino.Model([nothing], [nothing]), "CPU", settings)
    return int(compiled.get_property("INFERENCE_NUM_THREADS"))


class Streams:
    """`compiled`, a graph for one of `parts` equal parts of a batch, evaluated on all of them at once.

    Threads may share one: each call has the requests to itself until its outputs are copied.
    """

    def __init__(self, compiled: openvino.CompiledModel, parts: int) -> None:
        self.compiled = compiled
        self.requests = [compiled.create_infer_request() for _ in range(parts)]
        self._lock = threading.Lock()

    def infer(self, call: Call) -> tuple[NDArray[Any], ...]:
        """The outputs for the whole batch, copied out of the engine's memory."""
        with self._lock:
            return self._infer(call)

    def _infer(self, call: Call) -> tuple[NDArray[Any], ...]:
        if len(self.requests) == 1:
            results = self.requests[0].infer([tensor.numpy() for tensor in call.tensors], share_inputs=True)
            return tuple(np.array(output) for output in results.to_tuple())
        inputs = [
            [tensor.numpy() for tensor in call.part(k, len(self.requests))] for k in range(len(self.requests))
        ]
        try:
            for request, arrays in zip(self.requests, inputs, strict=True):
                request.start_async(arrays, share_inputs=True)
        finally:  # a part that runs still reads its inputs
            for request in self.requests:
                request.wait()
        parts = [request.results.to_tuple() for request in self.requests]
        return tuple(np.concatenate(outputs) for outputs in zip(*parts, strict=True))

"""One kind of call as a CUDA graph: launched as a whole, so that a GPU does not wait for Python between kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Evaluate = Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]
WARM_UP = 2
"""Evaluations before the one that is captured, as CUDA graphs ask for: libraries choose and allocate in the first."""


class Captured:
    """`evaluate(tensors)` captured once and then replayed on other tensors of the same shapes.

    The graph reads and writes memory of its own. Calls copy to it and from it, one after the other, whatever streams
    they are on. Raises `RuntimeError` where the evaluation does what no graph holds, such as reading a number back.
    """

    def __init__(self, evaluate: Evaluate, tensors: Sequence[torch.Tensor]) -> None:
        self._read = [tensor.clone() for tensor in tensors]
        device = self._read[0].device
        beside = torch.cuda.Stream(device)
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP):
                evaluate(self._read)
        torch.cuda.current_stream(device).wait_stream(beside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._written = evaluate(self._read)
        self._done = torch.cuda.Event()
        self._done.record()

    def __call__(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The outputs for `tensors`, which may lie on another device or be of other dtypes than those captured."""
        stream = torch.cuda.current_stream(self._read[0].device)
        stream.wait_event(self._done)
        for own, given in zip(self._read, tensors, strict=True):
            own.copy_(given, non_blocking=True)
        self._graph.replay()
        outputs = tuple(y.clone() for y in self._written)
        self._done.record(stream)
        return outputs

"""One kind of call as a CUDA graph: launched as a whole, so that a GPU does not wait for Python between kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

Evaluate = Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]


class Pool:
    """What the graphs of one network share: memory for what they compute, as long as one is replayed at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.handle = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self.done = torch.cuda.Event()


class Captured:
    """`evaluate(tensors)` captured once and then replayed on other tensors of the same shapes and dtypes.

    Calls copy to memory of the graph and from it, one after the other, whatever streams they are on. Before the
    evaluation that is captured two others, `unwatched`, let libraries choose and allocate; the second refuses what no
    graph holds, such as reading a number back: failing within a capture would leave torch's allocator in it.

    Raises `RuntimeError` where the evaluation cannot be captured.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        tensors: Sequence[torch.Tensor],
        pool: Pool,
        unwatched: AbstractContextManager[None],
    ) -> None:
        self._pool = pool
        self._read = [tensor.to(pool.device, copy=True) for tensor in tensors]
        before = torch.cuda.get_sync_debug_mode()
        stream = torch.cuda.current_stream(pool.device)
        pool.stream.wait_stream(stream)
        with torch.cuda.stream(pool.stream), unwatched:
            evaluate(self._read)
            torch.cuda.set_sync_debug_mode("error")
            try:
                evaluate(self._read)
            finally:
                torch.cuda.set_sync_debug_mode(before)
        stream.wait_stream(pool.stream)
        self._graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.stream(stream),  # is the current one again whatever happens within
            torch.cuda.graph(
                self._graph, pool=pool.handle, stream=pool.stream, capture_error_mode="thread_local"
            ),
        ):
            self._written = evaluate(self._read)
        pool.done.record(stream)

    def __call__(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The outputs for `tensors`, which may lie on another device than those captured."""
        stream = torch.cuda.current_stream(self._pool.device)
        stream.wait_event(self._pool.done)
        for own, given in zip(self._read, tensors, strict=True):
            own.copy_(given, non_blocking=True)
        self._graph.replay()
        outputs = tuple(y.clone() for y in self._written)
        self._pool.done.record(stream)
        return outputs

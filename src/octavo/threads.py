"""How many threads torch computes with, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Within the block, or the function that it decorates, torch computes with `threads` CPU threads.

    One is right for thousands of small steps: threads that share one wait for each other after it, spinning, and
    beside another busy process each wait may last as long as the system lets that process run. A range search by one
    thread takes 1.2 times as long as by two on two idle cores, and a quarter of it with a busy process beside it
    (benchmarks/search_threads.py). The sums are then the same bits on any number of cores, too.

    >>> with torch_threads(1):
    ...     torch.get_num_threads()
    1
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)

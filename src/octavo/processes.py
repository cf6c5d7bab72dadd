"""The processes that share one piece of work: which one this is, and how they agree and wait."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch

WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""The variables by which torchrun (and with it `accelerate launch`) and the MPIs tell how many processes there are."""

LONGEST_WAIT = timedelta(days=7)
"""A process that has no batch left waits for the others' last, which may take an hour of a large model on a CPU."""


@dataclass(frozen=True)
class Processes:
    """Process `rank` of `count`, 0 <= rank < count. `Processes()` is one that works alone.

    The methods are met by all processes together. They exchange integers only, by gloo on the CPU.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Return once every process has come here."""
        if self.count > 1:
            torch.distributed.barrier()

    def agree(self, values: Sequence[int]) -> list[int]:
        """The first process's values, in every process; all hand in equally many.

        >>> Processes().agree([3, 5])
        [3, 5]
        """
        if self.count == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        torch.distributed.broadcast(tensor, src=0)
        return [int(value) for value in tensor]

    @contextmanager
    def first_ahead(self) -> Iterator[None]:
        """The block is run by the first process, and then by all others: they find in the cache what it put there."""
        if not self.is_first:
            self.wait()
        try:
            yield
        finally:
            if self.is_first:
                self.wait()


def launched() -> bool:
    """Whether a launcher (`accelerate launch`, torchrun) started this process, be it as the only one."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_RANK" in os.environ


def join_processes() -> Processes:
    """This process's place among those that a launcher started; alone where there is no other.

    accelerate's `PartialState` is asked; it is initialised (CPU, gloo) only where several processes run.
    """
    from accelerate import PartialState  # type: ignore[import-untyped]

    alone = all(int(os.environ.get(name, 1)) < 2 for name in WORLD_SIZES)
    if alone and not PartialState._shared_state:
        return Processes()
    state = PartialState() if PartialState._shared_state else PartialState(cpu=True, timeout=LONGEST_WAIT)
    return Processes(state.process_index, state.num_processes)


def leave_processes() -> None:
    """Close the connection to the other processes, so that all may end."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

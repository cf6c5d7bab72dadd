"""Which group of timesteps a call of the network belongs to, found from the timestep within the network's own graph."""

from __future__ import annotations

from typing import Any

import torch

from octavo.errors import OctavoError
from octavo.quantization.fixed_dtype import FixedDtype


class CurrentGroup:
    """What the layers of one network share: the group of each row of the call that is running. No tensor of it is kept.

    A copy of the network gets one of its own, which its layers share in turn.
    """

    def __init__(self) -> None:
        self.index: torch.Tensor | None = None

    def of_rows(self, table: torch.Tensor, ndim: int) -> torch.Tensor:
        """The entries of `table` [G] for the rows of a tensor of `ndim` dimensions: `[rows, 1, ...]`, or `[1, ...]`.

        Raises `OctavoError` while no call of the network is running.
        """
        if self.index is None:
            raise OctavoError(
                "timestep_groups: this layer's scale depends on the timestep; call its network, not the layer alone"
            )
        # reshaped before it is gathered: of a constant table that is done when the graph is compiled
        return table.view(-1, *[1] * (ndim - 1)).index_select(0, self.index)

    def __deepcopy__(self, memo: dict[int, Any]) -> CurrentGroup:
        return CurrentGroup()


class TimestepGroups(FixedDtype):
    """G groups of timesteps, cut at G - 1 borders: group g holds the t with `borders[g - 1] <= t < borders[g]`.

    Elementwise comparisons and a sum, so that every engine finds the group in its graph. Buffer: `borders` float32
    [G - 1], ascending, as the network is told its timesteps; it keeps its dtype when the model is cast. `current`: what
    the layers that have a scale for each group read.

    >>> TimestepGroups(torch.tensor([10.0, 500.0])).index(torch.tensor([0, 10, 999]))
    tensor([0, 1, 2])
    """

    borders: torch.Tensor

    def __init__(self, borders: torch.Tensor) -> None:
        super().__init__()
        if borders.ndim != 1 or not len(borders):
            raise OctavoError(f"timestep_groups: borders {list(borders.shape)} are not [groups - 1]")
        self.register_buffer("borders", borders.to(torch.float32, copy=True))
        self.current = CurrentGroup()

    @classmethod
    def empty(cls, groups: int, device: Any = None) -> TimestepGroups:
        """So many groups, with borders uninitialised on `device`, for loading into."""
        return cls(torch.empty(groups - 1, device=device))

    def index(self, timestep: torch.Tensor) -> torch.Tensor:
        """The group of each row: int64 [rows], or [1] for a timestep without dimensions, which holds for all rows."""
        t = timestep.to(self.borders.device, torch.float32).reshape(-1, 1)
        return (t >= self.borders).sum(1)

    def enter(self, timestep: torch.Tensor) -> None:
        """A call with this timestep, [] or [rows], begins."""
        self.current.index = self.index(timestep)

    def leave(self) -> None:
        """The call is over."""
        self.current.index = None

    def extra_repr(self) -> str:
        return f"groups={len(self.borders) + 1}"

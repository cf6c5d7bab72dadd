"""A network's output corrected by timestep: an offset and a factor from a table, interpolated between its timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from octavo.errors import OctavoError
from octavo.quantization.fixed_dtype import FixedDtype


class OutputCorrection(FixedDtype):
    """`(y - mean(t)) / (1 + k(t))`, y the output of a quantized network that was told timestep t.

    Source: PTQD (He et al., 2305.10657), section 4.2: k is the part of the output's error that is correlated with the
    output, `mean` what is left of it on average. Both are linear in t between the timesteps of the table, and beyond
    its ends as at the nearer one; a table of one timestep holds for all.

    timesteps    float32 [T], ascending, as the network is told them.
    k            float32 [T], above -1.
    mean         float32 [T, ...], in the output's units; of one row, it is broadcast to y's: [T, C, 1, 1] for an output
                 [rows, C, height, width], [T, 1, C] for one [rows, tokens, C].

    The buffers keep their dtype when the model is cast. Raises `OctavoError` for shapes that do not fit each other.

    >>> mean = torch.tensor([0.0, 2.0]).view(2, 1, 1, 1)
    >>> correction = OutputCorrection(torch.tensor([0.0, 10.0]), torch.tensor([0.0, 1.0]), mean)
    >>> correction(torch.ones(3, 1, 1, 1), torch.tensor([-1, 0, 10])).flatten()
    tensor([ 1.0000,  1.0000, -0.5000])
    """

    timesteps: torch.Tensor
    k: torch.Tensor
    mean: torch.Tensor

    def __init__(self, timesteps: torch.Tensor, k: torch.Tensor, mean: torch.Tensor) -> None:
        super().__init__()
        shapes = [list(tensor.shape) for tensor in (timesteps, k, mean)]
        if timesteps.ndim != 1 or not len(timesteps) or shapes[1] != shapes[0] or shapes[2][:1] != shapes[0]:
            raise OctavoError(
                "output_correction: timesteps {}, k {} and mean {} are not [T], [T] and [T, ...]".format(
                    *shapes
                )
            )
        for name, tensor in (("timesteps", timesteps), ("k", k), ("mean", mean)):
            self.register_buffer(name, tensor.to(torch.float32, copy=True))

    @classmethod
    def empty(cls, shape: Sequence[int], device: Any = None) -> OutputCorrection:
        """One whose tensors are uninitialised on `device`, for loading into; `shape`: of `mean`."""
        return cls(*(torch.empty(size, device=device) for size in (shape[:1], shape[:1], shape)))

    def forward(self, y: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The corrected `y` [rows, ...], in its dtype. `timestep`: [] or [rows], any dtype."""
        k, mean = self.at(timestep)
        return ((y.float() - mean) / (1 + k)).to(y.dtype)

    def at(self, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k [rows, 1, ...] and the mean [rows, ...] at each timestep, elementwise: every engine can."""
        beside = [1] * (self.mean.ndim - 1)
        t = timestep.to(torch.float32).reshape(-1, 1, *beside)
        k, mean, knots = self.k.view(-1, *beside), self.mean, self.timesteps.view(-1, *beside)
        if len(knots) == 1:
            return k + 0 * t[:, 0], mean + 0 * t[:, 0]
        passed = ((t - knots[:-1]) / (knots[1:] - knots[:-1])).clamp(
            0, 1
        )  # [rows, T - 1, ...]: of each interval
        at_k, at_mean = (value[0] + (passed * (value[1:] - value[:-1])).sum(1) for value in (k, mean))
        return at_k, at_mean

    def extra_repr(self) -> str:
        return f"mean={list(self.mean.shape)}"

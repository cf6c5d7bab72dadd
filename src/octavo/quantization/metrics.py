"""How far a tensor is from its quantized self: the distances a range search minimises (PTQ4DM eq. 12-13)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Distance = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None", int], torch.Tensor]


def lp(
    x: torch.Tensor, x_sim: torch.Tensor, weights: torch.Tensor | None = None, dim: int = -1, p: float = 2.4
) -> torch.Tensor:
    """`sum_j w_j |x_j - x_sim_j|^p` over `dim`; p = 2.4 is what PTQ4DM calls "MSE" (section 3.1).

    `x`, `x_sim`: same shape, float; `weights`: how often each value occurs, same shape, None for once each.
    Returns float64 without `dim`.

    >>> lp(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 2.0]))
    tensor(1., dtype=torch.float64)
    """
    error = (x - x_sim).abs_()
    return _sum(error if p == 1 else error.pow_(p), weights, dim)


def l1(
    x: torch.Tensor, x_sim: torch.Tensor, weights: torch.Tensor | None = None, dim: int = -1
) -> torch.Tensor:
    """`sum_j w_j |x_j - x_sim_j|` over `dim`; arguments as for `lp`.

    >>> l1(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 5.0]), torch.tensor([1.0, 2.0]))
    tensor(7., dtype=torch.float64)
    """
    return lp(x, x_sim, weights, dim, p=1)


def cosine(
    x: torch.Tensor, x_sim: torch.Tensor, weights: torch.Tensor | None = None, dim: int = -1
) -> torch.Tensor:
    """`1 - <x, x_sim> / (|x| |x_sim|)` over `dim`; 0 when both are zero, 1 when one is. See `lp`.

    Below 1e-12 it is float64 noise and returned as 0.

    >>> cosine(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    tensor(1., dtype=torch.float64)
    """
    x, x_sim = x.double(), x_sim.double()
    product = _sum(x * x_sim, weights, dim)
    norms = _sum(x * x, weights, dim).sqrt() * _sum(x_sim * x_sim, weights, dim).sqrt()
    both_zero = (x == 0).all(dim) & (x_sim == 0).all(dim)
    distance = 1 - product / norms.clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(both_zero | (distance < 1e-12), 0.0, distance)


def kl(
    x: torch.Tensor, x_sim: torch.Tensor, weights: torch.Tensor | None = None, dim: int = -1
) -> torch.Tensor:
    """`KL(P || Q) = sum_j P_j log(P_j / Q_j)` over `dim`, for values that are the centres of equal bins.

    P is the histogram of x (`weights` over their sum). Q is the most that the integers can tell of it: the
    mass of each integer, spread evenly over the occupied bins that are rounded to it (Migacz 2017, TensorRT;
    here what the range clips is rounded to the end integers and so belongs to their cells). Arguments as for
    `lp`; the values must ascend along `dim`. Raw values say nothing until they are binned (`Metric.binned`).
    With m the mass of a bin, M that of a cell and n its occupied bins it is computed as `(sum m log m - sum M
    log(M / n)) / sum m`: counts add up exactly. Below 1e-12 it is float64 noise and returned as 0.

    >>> x = torch.arange(4.0)
    >>> kl(x, x, torch.tensor([5.0, 1.0, 1.0, 1.0])).item()  # one integer a bin: nothing is lost
    0.0
    >>> round(kl(x, torch.tensor([0.5, 0.5, 2.5, 2.5]), torch.tensor([5.0, 1.0, 1.0, 1.0])).item(), 3)
    0.182
    """
    x_sim = x_sim.movedim(dim, -1)
    mass = torch.ones_like(x_sim) if weights is None else weights.movedim(dim, -1)
    mass = mass.double()
    cell = torch.zeros_like(x_sim, dtype=torch.int64)
    torch.cumsum(x_sim[..., 1:] != x_sim[..., :-1], -1, out=cell[..., 1:])
    cells = int(cell[..., -1:].max()) + 1 if cell.numel() else 0
    empty = mass.new_zeros(*cell.shape[:-1], cells)
    cell_mass = empty.scatter_add(-1, cell, mass)
    cell_bins = empty.scatter_add_(-1, cell, (mass > 0).double())
    lost = _m_log_m(mass) - _m_log_m(cell_mass, cell_bins.clamp_(min=1))
    lost = lost / mass.sum(-1).clamp(min=1e-300)
    return torch.where(lost < 1e-12, 0.0, lost)


def _m_log_m(mass: torch.Tensor, bins: torch.Tensor | None = None) -> torch.Tensor:
    """`sum m log(m / bins)` over the last dimension, where 0 log 0 = 0."""
    tiny = mass.clamp(min=torch.finfo(mass.dtype).tiny)
    return (mass * (tiny if bins is None else tiny.div_(bins)).log_()).sum(-1)


def _sum(terms: torch.Tensor, weights: torch.Tensor | None, dim: int) -> torch.Tensor:
    if weights is not None:
        terms = terms.double() * weights
    return terms.sum(dim, dtype=torch.float64)


@dataclass(frozen=True)
class Metric:
    """A named choice of range: the `distance` to minimise (None: take the full range, no search).

    `binned`: the distance compares histograms, so raw values must be binned before it sees them.
    """

    distance: Distance | None
    binned: bool = False


METRICS: dict[str, Metric] = {
    "mse": Metric(lp),
    "l1": Metric(l1),
    "cosine": Metric(cosine),
    "kl": Metric(kl, binned=True),
    "minmax": Metric(None),
}
"""Every metric by the name a recipe uses. "mse" is the L_p distance with p = 2.4."""

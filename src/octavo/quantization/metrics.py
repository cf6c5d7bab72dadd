"""How far a tensor is from its quantized self: the distances a range search minimises (PTQ4DM eq. 12-13)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Distance = Callable[..., torch.Tensor]  # x, x_sim, weights, dim; of histograms also step


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
    x: torch.Tensor,
    x_sim: torch.Tensor,
    weights: torch.Tensor | None = None,
    dim: int = -1,
    step: torch.Tensor | None = None,
) -> torch.Tensor:
    """`KL(P || Q) = sum_j P_j log(P_j / Q_j)` over `dim`, for values that are the centres of equal bins (Migacz 2017).

    P is the histogram of x (`weights` over their sum) with what the range clips counted in the first and the last
    occupied bin that it holds. Q is the most that the integers can tell of what the range holds: the mass of each
    integer, spread evenly over the occupied bins that are rounded to it. Q lacks what is clipped, so clipping costs.
    A bin is clipped where `|x - x_sim| > step / 2`; `step`, the distance between neighbouring integers, has the shape
    of the result with a dimension of 1 at `dim` (None: the smallest difference within `x_sim`). Other arguments as for
    `lp`; the values must ascend along `dim`. Raw values say nothing until they are binned (`Metric.binned`). Infinite
    where all mass is clipped; below 1e-12 it is float64 noise and returned as 0.

    >>> x = torch.arange(4.0)
    >>> counts = torch.tensor([5.0, 1.0, 1.0, 1.0])
    >>> kl(x, x, counts).item()  # one integer a bin: nothing is lost
    0.0
    >>> round(kl(x, torch.tensor([0.5, 0.5, 2.5, 2.5]), counts).item(), 3)  # two bins an integer
    0.182
    >>> round(kl(x, torch.tensor([0.0, 1.0, 1.0, 1.0]), counts).item(), 3)  # 1 holds three bins, two of them clipped
    0.124
    """
    x, x_sim = x.movedim(dim, -1), x_sim.movedim(dim, -1)
    mass = torch.ones_like(x_sim) if weights is None else weights.movedim(dim, -1)
    mass = mass.double()
    if x_sim.shape[-1] == 0:
        return mass.sum(-1)
    rises = x_sim[..., 1:] - x_sim[..., :-1]
    if step is None:
        rises_or_inf = torch.where(rises > 0, rises, torch.inf)
        step = rises_or_inf.amin(-1, keepdim=True) if rises.numel() else x.new_tensor(torch.inf)
    else:
        step = step.movedim(dim, -1)
    held = (mass > 0) & ((x - x_sim).abs() <= step * _HALF)
    cell = torch.zeros_like(x_sim, dtype=torch.int64)
    torch.cumsum(rises != 0, -1, out=cell[..., 1:])
    cells = int(cell[..., -1:].max()) + 1 if cell.numel() else 0
    held_mass = mass * held
    empty = mass.new_zeros(*cell.shape[:-1], cells)
    cell_mass = empty.scatter_add(-1, cell, held_mass)
    cell_bins = empty.scatter_add_(-1, cell, held.double())
    q = (cell_mass / cell_bins.clamp_(min=1)).gather(-1, cell)
    p = _clipped_into_the_ends(mass, held)
    tiny = torch.finfo(torch.float64).tiny
    log_ratio = torch.where(held, p.clamp(min=tiny).log_() - q.clamp(min=tiny).log_(), 0.0)
    total, kept = mass.sum(-1), held_mass.sum(-1)
    lost = (p * log_ratio).sum(-1) / total.clamp(min=tiny) - (total / kept).log_()
    lost = torch.where(kept > 0, lost, torch.where(total > 0, torch.inf, 0.0))
    return torch.where(lost < 1e-12, 0.0, lost)


_HALF = 0.5 * (1 + 1e-4)  # what is rounded to an integer is at most half a step away, and float32 rounding


def _clipped_into_the_ends(mass: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """The masses `[..., N]` of the held bins, where the first and the last have what lies beyond them as well."""
    index = torch.arange(mass.shape[-1], device=mass.device)
    first = torch.where(held, index, mass.shape[-1] - 1).amin(-1, keepdim=True)
    last = torch.where(held, index, 0).amax(-1, keepdim=True)
    p = mass * held
    p.scatter_add_(-1, first, (mass * (index < first)).sum(-1, keepdim=True))
    return p.scatter_add_(-1, last, (mass * (index > last)).sum(-1, keepdim=True))


def _sum(terms: torch.Tensor, weights: torch.Tensor | None, dim: int) -> torch.Tensor:
    if weights is not None:
        terms = terms.double() * weights
    return terms.sum(dim, dtype=torch.float64)


@dataclass(frozen=True)
class Metric:
    """A named choice of range: the `distance` to minimise (None: take the full range, no search).

    `binned`: the distance compares histograms, so raw values must be binned before it sees them, and it is told the
    step between integers. A range whose integers are finer than the bins is no candidate: the bins cannot judge it.
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

"""Passes over the calibration pairs that know each row's timestep: ranges by timestep, histograms by group of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from octavo.calibration.collect import PairStore
from octavo.calibration.evaluate import evaluate_rows, rows_at_once
from octavo.calibration.operations import TIMESTEP_GROUPS, timestep_of
from octavo.calibration.timestep_borders import search_borders
from octavo.calibration.tracing import evaluating
from octavo.quantization import HistogramObserver, TimestepGroups
from octavo.quantization.balancing import multiplied_input

See = Callable[[str, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class Passes:
    """What a pass over the pairs needs."""

    denoiser: nn.Module
    pairs: PairStore
    layers: Mapping[str, nn.Module]
    multipliers: Mapping[str, torch.Tensor]
    progress: bool

    def run(self, what: str, see: See) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Evaluate all pairs, with `see(layer's name, its input, timesteps [rows])` for each layer that runs.

        After each evaluation yields its timesteps by row and by pair, float64 [rows] and [pairs].
        """
        told: list[torch.Tensor] = []

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            timestep = timestep_of(module, args, kwargs, TIMESTEP_GROUPS).double().cpu()
            sample = args[0] if args else next(iter(kwargs.values()))
            told[:] = [timestep.reshape(-1).expand(len(sample))]

        def hook_of(name: str) -> Any:
            m = self.multipliers.get(name)

            def hook(layer: Any, args: tuple[torch.Tensor, ...]) -> None:
                x = args[0]
                if m is not None:
                    x = multiplied_input(x, m.to(x.device), layer.weight.ndim)
                see(name, x, told[0])

            return hook

        hooks = [self.denoiser.register_forward_pre_hook(before, with_kwargs=True)]
        hooks += [layer.register_forward_pre_hook(hook_of(name)) for name, layer in self.layers.items()]
        with torch.inference_mode(), evaluating(self.denoiser), _removed(hooks):
            for batch in tqdm(
                self.pairs, desc=what, unit="batch", total=len(self.pairs), disable=not self.progress
            ):
                for rows in rows_at_once(batch):
                    evaluate_rows(self.denoiser, rows)
                    ends = torch.tensor(list(accumulate(pair.num_rows for pair in rows))) - 1
                    yield told[0], told[0][ends]


@contextmanager
def _removed(hooks: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def group_borders(passes: Passes, most_groups: int) -> tuple[list[float], list[str]]:
    """The borders, and the layers that always ran on the network's rows."""
    of_call: dict[str, list[torch.Tensor]] = {}
    others: set[str] = set()
    sums: dict[float, NDArrays] = {}
    num_pairs: dict[float, int] = {}

    def see(name: str, x: torch.Tensor, timesteps: torch.Tensor) -> None:
        if x.shape[0] != len(timesteps) or x.ndim < 2:
            others.add(name)
            return
        low, high = x.float().flatten(1).aminmax(dim=1)
        of_call.setdefault(name, []).append(high.clamp(min=0) - low.clamp(max=0))

    names = list(passes.layers)
    for of_rows, of_pairs in passes.run("ranges by timestep", see):
        for t in of_pairs.tolist():
            num_pairs[t] = num_pairs.get(t, 0) + 1
        for row, t in enumerate(of_rows.tolist()):
            value, count = sums.setdefault(t, (np.zeros(len(names)), np.zeros(len(names))))
            for i, name in enumerate(names):
                for ranges in of_call.get(name, []):
                    value[i] += np.log(max(float(ranges[row]), 1e-12))
                    count[i] += 1
        of_call.clear()
    timesteps = sorted(sums)
    observed = np.array(
        [name not in others and all(sums[t][1][i] for t in timesteps) for i, name in enumerate(names)]
    )
    if not timesteps or not observed.any():
        return [], []
    v = np.stack([sums[t][0][observed] / sums[t][1][observed] for t in timesteps])
    borders = search_borders(timesteps, [num_pairs.get(t, 0) for t in timesteps], v, most_groups)
    return borders, [name for name, kept in zip(names, observed, strict=True) if kept]


NDArrays = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def group_histograms(
    passes: Passes, groups: TimestepGroups, names: Sequence[str]
) -> dict[str, list[HistogramObserver]]:
    """By layer, of each group; without layers that are not in `names`."""
    num_groups = len(groups.borders) + 1
    observers = {name: [HistogramObserver() for _ in range(num_groups)] for name in names}

    def see(name: str, x: torch.Tensor, timesteps: torch.Tensor) -> None:
        if name not in observers:
            return
        index = groups.index(timesteps)
        for g in index.unique().tolist():
            mine = x if bool((index == g).all()) else x[(index == g).to(x.device)]
            observers[name][g].observe(mine)

    for _ in passes.run("observe by timestep", see):
        pass
    return observers

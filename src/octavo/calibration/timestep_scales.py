"""Activation scales by timestep: groups of timesteps found on calibration pairs, and each layer's scale in each."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from octavo.calibration.collect import PairStore
from octavo.calibration.evaluate import evaluate_rows, rows_at_once
from octavo.calibration.operations import TIMESTEP_GROUPS, timestep_of
from octavo.calibration.rules import LayerRule
from octavo.calibration.timestep_borders import search_borders
from octavo.calibration.tracing import evaluating
from octavo.errors import OctavoError
from octavo.files import atomic_path
from octavo.quantization import HistogramObserver, QParams, TimestepGroups, search_grouped_scales, walk
from octavo.quantization.balancing import multiplied_input

LEAST_GAIN = 0.05
"""A layer has scales by timestep only where the squared error of its input falls by this fraction: they cost time."""

See = Callable[[str, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class TimestepScales:
    """The groups of timesteps, and the layers that have a scale for each; empty where none has.

    borders  float32 [G - 1], ascending (`TimestepGroups`).
    qparams  layer name -> the fixed quantizer that serves all groups; factors: layer name -> float32 [G].
    errors   layer name -> the squared error of its input over that with one scale.
    """

    borders: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    qparams: dict[str, QParams] = field(default_factory=dict)
    factors: dict[str, torch.Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def groups(self) -> TimestepGroups:
        return TimestepGroups(self.borders)

    def groups_of(self, layer: str) -> int:
        """How many scales the layer has."""
        return len(self.factors[layer]) if layer in self.factors else 1


def timestep_scales(
    denoiser: nn.Module,
    pairs: PairStore,
    rules: Mapping[str, LayerRule],
    most_groups: int,
    *,
    metric: str = "mse",
    multipliers: Mapping[str, torch.Tensor] | None = None,
    state: Path | None = None,
    progress: bool = True,
) -> TimestepScales:
    """At most `most_groups` groups of timesteps and each layer's scales in them; empty where no layer gains by them.

    Two passes over the pairs: one for the ranges max(x, 0) - min(x, 0) of each layer's input at each timestep, by which
    `search_borders` cuts the timesteps into groups; one for a histogram of each layer's input in each group, by which
    `search_grouped_scales` chooses scales. A layer whose error falls by less than `LEAST_GAIN`, or whose input has not
    the network's rows, keeps one scale.

    `multipliers`: of the balanced layers, which are observed behind them. Memory: a number for each timestep and layer,
    then G histograms of 64 KiB for each layer. With `state`, a file, a finished search is not made again. `denoiser` is
    not changed. Raises `OctavoError` for a network that is told no timestep, or several for a row.
    """
    if state is not None and state.is_file():
        return _load(state)
    layers = {name: layer for name, layer in walk(denoiser) if name in rules}
    passes = _Passes(denoiser, pairs, layers, multipliers or {}, progress)
    borders, names = _borders(passes, most_groups)
    found = TimestepScales()
    if borders:
        groups = TimestepGroups(torch.tensor(borders))
        observers = _histograms(passes, groups, names)
        found = _chosen(groups, observers, rules, metric, progress)
    if state is not None:
        _save(state, found)
    return found


def summary(found: TimestepScales, layers: int) -> dict[str, Any]:
    """JSON-safe: the borders, how many of how many layers have scales by timestep, and the median of their errors."""
    if not found.factors:
        return {"groups": 1, "layers": 0, "of_layers": layers}
    return {
        "groups": len(found.borders) + 1,
        "borders": found.borders.tolist(),
        "layers": len(found.factors),
        "of_layers": layers,
        "median_error_over_one_scale": round(statistics.median(found.errors.values()), 4),
    }


@dataclass(frozen=True)
class _Passes:
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


def _borders(passes: _Passes, most_groups: int) -> tuple[list[float], list[str]]:
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
    observed = np.array([name not in others for name in names])
    observed &= np.all([sums[t][1] > 0 for t in timesteps], axis=0)
    if not observed.any():
        return [], []
    v = np.stack([sums[t][0][observed] / sums[t][1][observed] for t in timesteps])
    borders = search_borders(timesteps, [num_pairs.get(t, 0) for t in timesteps], v, most_groups)
    return borders, [name for name, kept in zip(names, observed, strict=True) if kept]


NDArrays = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def _histograms(
    passes: _Passes, groups: TimestepGroups, names: Sequence[str]
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


def _chosen(
    groups: TimestepGroups,
    observers: Mapping[str, Sequence[HistogramObserver]],
    rules: Mapping[str, LayerRule],
    metric: str,
    progress: bool,
) -> TimestepScales:
    found = TimestepScales(groups.borders)
    for name, of_groups in tqdm(
        observers.items(), desc="scales by timestep", unit="layer", disable=not progress
    ):
        scales = search_grouped_scales(of_groups, rules[name].activations, metric)
        if scales.error <= 1 - LEAST_GAIN:
            found.qparams[name], found.factors[name] = scales.qparams, scales.factors
            found.errors[name] = scales.error
    return found if found.factors else TimestepScales()


def _save(path: Path, found: TimestepScales) -> None:
    tensors = {"borders": found.borders}
    for name, factors in found.factors.items():
        tensors[f"factors/{name}"] = factors
        tensors[f"scale/{name}"] = found.qparams[name].scale
        tensors[f"zero_point/{name}"] = found.qparams[name].zero_point
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"errors": json.dumps(found.errors)})


def _load(path: Path) -> TimestepScales:
    try:
        with safe_open(path, "pt") as file:
            errors = {str(name): float(error) for name, error in json.loads(file.metadata()["errors"]).items()}
            qparams = {
                name: QParams(file.get_tensor(f"scale/{name}"), file.get_tensor(f"zero_point/{name}"))
                for name in errors
            }
            factors = {name: file.get_tensor(f"factors/{name}") for name in errors}
            return TimestepScales(file.get_tensor("borders"), qparams, factors, errors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise OctavoError(f"{path}: not readable; delete it and start again") from error

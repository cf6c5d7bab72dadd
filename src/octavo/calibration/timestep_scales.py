"""Activation scales by timestep: groups of timesteps found on calibration pairs, and each layer's scale in each."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from octavo.calibration.collect import PairStore
from octavo.calibration.rules import LayerRule
from octavo.calibration.timestep_observations import Passes, group_borders, group_histograms
from octavo.errors import OctavoError
from octavo.files import atomic_path
from octavo.quantization import HistogramObserver, QParams, TimestepGroups, search_grouped_scales, walk

LEAST_GAIN = 0.05
"""A layer has scales by timestep only where the squared error of its input falls by this fraction: they cost time."""


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
    layers = {
        name: layer
        for name, layer in walk(denoiser)
        if name in rules and not rules[name].activations.is_float
    }
    passes = Passes(denoiser, pairs, layers, multipliers or {}, progress)
    borders, names = group_borders(passes, most_groups)
    found = TimestepScales()
    if borders:
        groups = TimestepGroups(torch.tensor(borders))
        observers = group_histograms(passes, groups, names)
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
            errors = {
                str(name): float(error) for name, error in json.loads(file.metadata()["errors"]).items()
            }
            qparams = {
                name: QParams(file.get_tensor(f"scale/{name}"), file.get_tensor(f"zero_point/{name}"))
                for name in errors
            }
            factors = {name: file.get_tensor(f"factors/{name}") for name in errors}
            return TimestepScales(file.get_tensor("borders"), qparams, factors, errors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise OctavoError(f"{path}: not readable; delete it and start again") from error

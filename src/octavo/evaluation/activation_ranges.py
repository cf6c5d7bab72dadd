"""What each layer reads at each timestep, beside the range that its scale can hold."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from octavo.errors import OctavoError
from octavo.evaluation.trajectory import TrajectoryStep, replay
from octavo.quantization import QuantLayer, integer_layers

QUANTILES = (0.001, 0.01, 0.25, 0.5, 0.75, 0.99, 0.999)
MOST_VALUES = 2**16
"""Quantiles are taken of so many values of each input, evenly strided; extremes and shares of them all."""


@dataclass(frozen=True)
class InputRange:
    """The range of reals that a layer's quantizer can hold: [(qmin - z) s, (qmax - z) s].

    scale, zero_point, bits: as calibrated, one for the whole tensor.
    """

    scale: float
    zero_point: int
    bits: int
    low: float
    high: float

    @classmethod
    def of(cls, layer: QuantLayer) -> InputRange:
        scale, zero_point = float(layer.input_scale), int(layer.input_zero_point)
        spec = layer.input_spec
        return cls(
            scale, zero_point, spec.bits, (spec.qmin - zero_point) * scale, (spec.qmax - zero_point) * scale
        )


@dataclass(frozen=True, eq=False)
class ActivationRange:
    """One layer's input over T steps, and the range chosen for it.

    minimum, maximum  float64 [T]. quantiles: float64 [T, 7], those of QUANTILES.
    outside           float64 [T]: share of the values beyond the chosen range by more than half a scale: those that
                      saturate, and lose more than rounding would take.
    """

    layer: str
    timesteps: tuple[float, ...]
    minimum: NDArray[np.float64]
    maximum: NDArray[np.float64]
    quantiles: NDArray[np.float64]
    outside: NDArray[np.float64]
    chosen: InputRange

    @property
    def drift(self) -> float:
        """How much the range changes over the trajectory: its widest by its narrowest step, 0.1 % to 99.9 %."""
        widths = np.maximum(self.quantiles[:, -1] - self.quantiles[:, 0], 1e-12)
        return float(widths.max() / widths.min())


def activation_ranges(
    quantized: nn.Module,
    reference: nn.Module,
    steps: list[TrajectoryStep],
    layers: Collection[str] | None = None,
) -> list[ActivationRange]:
    """The inputs of the layers with integer activations (those named, or all) in the full-precision network, by step.

    Of a balanced layer, behind its multiplication: what its quantizer reads. Of one with scales by timestep, the range
    is that of its fixed quantizer, and the input is as it was before the factor of its group.
    Extremes and shares are exact; quantiles are of at most 65,536 evenly strided values of each input. Layers that
    never run are left out. Raises `OctavoError` for an unknown layer. Source: PTQ4DM (2211.15736), figure 3.
    """
    ours = dict(integer_layers(quantized))
    wanted = list(ours if layers is None else layers)
    theirs = dict(reference.named_modules())
    for name in wanted:
        if name not in ours:
            raise OctavoError(f"layers: {name} is no layer with integer activations of this model")
        if name not in theirs:
            raise OctavoError(f"reference: has no layer {name}; give the model that was quantized")
    chosen = {name: InputRange.of(ours[name]) for name in wanted}
    pending: dict[str, list[torch.Tensor]] = {}
    totals: dict[str, NDArray[np.float64]] = {}
    rows: dict[str, list[NDArray[np.float64]]] = {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            values = ours[name].balanced_input(args[0].detach()).float().flatten()
            low, high = chosen[name].low - chosen[name].scale / 2, chosen[name].high + chosen[name].scale / 2
            outside = ((values < low) | (values > high)).sum().item()
            extremes = [values.min().item(), values.max().item(), float(outside), float(len(values))]
            before = totals.get(name)
            totals[name] = np.array(extremes) if before is None else _joined(before, np.array(extremes))
            pending.setdefault(name, []).append(values[:: -(-len(values) // MOST_VALUES)].cpu())

        return hook

    with ExitStack() as stack:
        for name in wanted:
            stack.callback(theirs[name].register_forward_pre_hook(look(name)).remove)
        for _ in replay(reference, steps):
            for name, parts in pending.items():
                low, high, outside, count = totals[name]
                quantiles = np.quantile(torch.cat(parts).numpy().astype(np.float64), QUANTILES)
                rows.setdefault(name, []).append(np.array([low, high, outside / count, *quantiles]))
            pending.clear()
            totals.clear()
    timesteps = tuple(step.timestep for step in steps)
    found = []
    for name, values in rows.items():
        if len(values) == len(steps):
            table = np.stack(values)
            found.append(
                ActivationRange(
                    name, timesteps, table[:, 0], table[:, 1], table[:, 3:], table[:, 2], chosen[name]
                )
            )
    return found


def _joined(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Minimum, maximum, values outside and values of two inputs of one step together."""
    return np.array([min(a[0], b[0]), max(a[1], b[1]), a[2] + b[2], a[3] + b[3]])


def layers_worth_showing(ranges: list[ActivationRange], by_error: list[str], count: int = 6) -> list[str]:
    """Half by error, those first in `by_error`; the rest by how much their range drifts over the trajectory.

    Of layers that read the same tensor one is enough. The names come in the network's order, each once.
    """
    by_name = {found.layer: found for found in ranges}
    picked: list[ActivationRange] = []

    def pick(candidates: list[ActivationRange], most: int) -> None:
        for found in candidates:
            if len(picked) >= most:
                return
            if not any(np.array_equal(found.quantiles, other.quantiles) for other in picked):
                picked.append(found)

    pick([by_name[name] for name in by_error if name in by_name], -(-count // 2))
    pick(sorted(ranges, key=lambda found: -found.drift), count)
    chosen = {found.layer for found in picked}
    return [name for name in by_name if name in chosen]

"""Balancing as a whole: the multipliers, those that the module in front takes, and what the quantizers then read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from octavo.calibration.absorption import Absorbers, absorb, find_absorbers
from octavo.calibration.balance import multipliers
from octavo.calibration.collect import PairStore
from octavo.calibration.evaluate import rows_at_once
from octavo.calibration.observations import Observations, observe
from octavo.calibration.recipe import PTQ4DM
from octavo.calibration.rules import LayerRule
from octavo.diffusion import collate
from octavo.errors import OctavoError


@dataclass(frozen=True)
class Balanced:
    """What is quantized in place of the original network.

    network      an equivalent float network; the original itself where nothing is absorbed.
    multipliers  layer -> float32 `[input channels]`, of the layers that multiply by themselves.
    absorbed     module -> the layers whose input it multiplies.
    all_multipliers  both together: of every balanced layer, as the original network's inputs are multiplied.
    """

    network: nn.Module
    multipliers: dict[str, torch.Tensor] = field(default_factory=dict)
    absorbed: Absorbers = field(default_factory=dict)
    all_multipliers: dict[str, torch.Tensor] = field(default_factory=dict)

    def changed(self) -> set[str]:
        """The names of the modules whose weights are not the original's."""
        return {*self.absorbed, *(name for readers in self.absorbed.values() for name in readers)}

    def summary(self) -> dict[str, Any]:
        """JSON-safe, what is to be remembered of it: `absorbed`, if anything was."""
        absorbed = {name: list(readers) for name, readers in self.absorbed.items()}
        return {"absorbed": absorbed} if absorbed else {}


def balance(
    recipe: PTQ4DM,
    denoiser: nn.Module,
    pairs: PairStore,
    rules: Mapping[str, LayerRule],
    seen: Observations,
    seed: int,
    folder: Path | None = None,
    progress: bool = False,
) -> Balanced:
    """Balance `denoiser`, where the recipe asks for it; `seen` is given what these layers see behind their multipliers.

    `denoiser` is left as it was.
    """
    if not recipe.balance:
        return Balanced(denoiser)
    absorbers: Absorbers = {}
    if recipe.absorb:
        device = next(denoiser.parameters()).device
        if other := {p.dtype for p in denoiser.parameters() if p.is_floating_point()} - {torch.float32}:
            raise OctavoError(
                f"absorb: needs a network in float32, whose weights it changes before they are rounded; this one holds "
                f"{str(other.pop()).removeprefix('torch.')}: load it in float32, or leave absorb out"
            )
        call = collate(next(iter(rows_at_once(pairs.load(0))))[:1], device)
        absorbers = find_absorbers(denoiser, call, set(rules), through_attention=not recipe.attention_matmuls)
    found = multipliers(
        denoiser,
        pairs,
        rules,
        metric=recipe.metric,
        rounding=recipe.rounding,
        together=list(absorbers.values()),
        seed=seed,
        state=folder / "multipliers.safetensors" if folder else None,
        progress=progress,
    )
    if not found:
        return Balanced(denoiser)
    behind = observe(denoiser, pairs, multipliers=found, state_folder=folder, progress=progress)
    seen.layers.update(behind.layers)
    absorbed = {
        module: readers
        for module, readers in absorbers.items()
        if all(name in found and torch.equal(found[name], found[readers[0]]) for name in readers)
    }
    without = {name for readers in absorbed.values() for name in readers}
    return Balanced(
        absorb(denoiser, absorbed, found) if absorbed else denoiser,
        {name: m for name, m in found.items() if name not in without},
        absorbed,
        found,
    )

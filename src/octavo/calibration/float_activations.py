"""Which layers keep float activations: those that err most at the output, until int8 errs less than bf16 would.

Errors are far from even: what reads the residual stream as it is (shortcuts, down- and upsampling) and attention's
layers err most and multiply least. Their weights stay integers on disk; their products are float ones.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from octavo.calibration.activation_errors import Errors
from octavo.calibration.rules import LayerRule
from octavo.quantization import FLOAT, QuantSpec

ANY_LAYER = 0.1
"""What a float layer costs by being one, in multiply-adds of the average layer: passes over its input and output."""
MARGIN = 10**-0.1
"""1 dB: how much less than bf16's the error is to be."""


def keep_float(
    rules: Mapping[str, LayerRule], share: float, errors: Errors, kept: Collection[str] = ()
) -> tuple[dict[str, LayerRule], dict[str, Any]]:
    """The rules with float activations for some layers, and JSON-safe what is to be remembered of it.

    With e[l, r] the error of layer l on row r, and b[r] that of bf16 (`Errors`), layers are taken in the order of
    mean_r (e[l, r] / sum_k e[k, r]) over their cost, as long as their costs add up to at most `share`, until

        mean_r log(sum_l e[l, r] / b[r]) <= log 0.79      l: the layers that are left; 1 dB nearer than bf16

    A layer's cost is its share of the multiply-adds of all layers in `rules`, and `ANY_LAYER` of the average layer's.
    Layers that were too many to be measured are never taken, but are in both sums by their estimate; so are those in
    `kept`, whose bits somebody asked for. In a network that is in bf16 itself there is no b, and `share` alone ends
    the choice.
    """
    costs = {name: errors.macs[name] + ANY_LAYER / len(rules) for name in errors.layers}
    every = {**errors.layers, **errors.estimated}
    together = torch.stack(list(every.values())).sum(0) if every else torch.zeros(1)
    worth = {
        name: _share(own, together) / costs[name] for name, own in errors.layers.items() if name not in kept
    }
    left, room, chosen = together, share, []
    for name in sorted(worth, key=worth.__getitem__, reverse=True):
        if not worth[name] or _over(left, errors.bf16) <= MARGIN:
            break
        if costs[name] <= room:
            room -= costs[name]
            left = left - errors.layers[name]
            chosen.append(name)
    over = [_over(each, errors.bf16) for each in (together, left)]
    summary = {
        "layers": [name for name in rules if name in chosen],
        "measured": len(errors.layers),
        "of_layers": len(every),
        "cost": round(sum(costs[name] for name in chosen), 4),
        "error_over_bf16": [round(ratio, 4) if math.isfinite(ratio) else None for ratio in over],
    }
    floats = {name: replace(rules[name], activations=QuantSpec(FLOAT)) for name in chosen}
    return {**rules, **floats}, summary


def _over(errors: torch.Tensor, bf16: torch.Tensor) -> float:
    """The geometric mean over rows of one squared error over the other; infinite where one of the others is 0.

    >>> _over(torch.tensor([2.0, 8.0]), torch.tensor([1.0, 1.0])), _over(torch.ones(1), torch.zeros(1))
    (4.0, inf)
    """
    if not bool((bf16 > 0).all()):
        return math.inf
    return float((errors.clamp(min=0) / bf16).log().mean().exp())


def _share(own: torch.Tensor, together: torch.Tensor) -> float:
    """A layer's mean share of a row's errors; 0 of rows without any.

    >>> _share(torch.tensor([3.0, 0.0]), torch.tensor([4.0, 0.0]))
    0.375
    """
    return float((own / torch.where(together > 0, together, 1.0)).mean())

"""Where the error arises: each quantized layer against its float original, on the same input, step by step."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from octavo.errors import OctavoError
from octavo.evaluation.trajectory import TrajectoryStep, replay
from octavo.quantization import quantized_layers, sub_pixel_layers, sub_pixel_names, with_sub_pixel


@dataclass(frozen=True, eq=False)
class LayerErrors:
    """Relative errors of L layers at T steps.

    layers     names, in the order in which they first ran.
    timesteps  the training timestep of each step, from the noisy end.
    errors     float64 [L, T]; NaN where a layer did not run, or its output is all zeros.
    """

    layers: tuple[str, ...]
    timesteps: tuple[float, ...]
    errors: NDArray[np.float64]

    def worst(self) -> list[int]:
        """Indices of the layers, that with the largest mean error first; layers that never ran are last."""
        seen = np.isfinite(self.errors)
        mean = np.where(seen, self.errors, 0.0).sum(1) / np.maximum(seen.sum(1), 1)
        return [int(i) for i in np.argsort(-mean, kind="stable")]


def layer_errors(quantized: nn.Module, reference: nn.Module, steps: list[TrajectoryStep]) -> LayerErrors:
    """The error that each layer of `quantized` adds, along one trajectory of the full-precision network.

    For layer l and step t, over all elements of all outputs of the step:

        e[l, t] = || Q_l(x) - F_l(x) ||_2 / || F_l(x) ||_2

    F_l is the layer of `reference`, x the input that it has there, and Q_l the quantized layer of the same name in
    its float simulation of the integer kernel. Both see the SAME float input, so e is what this layer adds and not
    what those before it did. Sums are taken in float64. Networks and modes are left as they were. Of a sub-pixel
    convolution, F_l is the one that stands for the upsampling and the layer of `reference`.

    Raises `OctavoError` if `reference` lacks one of the layers, or runs none of them (an accelerated network).
    """
    ours = dict(quantized_layers(quantized))
    changed = set(sub_pixel_names(quantized)) & set(sub_pixel_layers(reference))
    if changed:
        reference = with_sub_pixel(reference, changed)
    theirs = dict(reference.named_modules())
    for name in ours:
        if name not in theirs:
            raise OctavoError(f"reference: has no layer {name}; give the model that was quantized")
    sums: dict[str, NDArray[np.float64]] = {}
    now = 0

    def compare(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            difference = (ours[name](args[0]) - output).double()
            row = sums.setdefault(name, np.zeros((len(steps), 2)))
            row[now] += difference.square().sum().item(), output.double().square().sum().item()

        return hook

    with ExitStack() as stack:
        for name in ours:
            stack.callback(theirs[name].register_forward_hook(compare(name)).remove)
        for i in replay(reference, steps):
            now = i + 1
    if not sums:
        raise OctavoError(
            "reference: ran none of the quantized layers; give it as it was before it was accelerated"
        )
    stacked = np.stack(list(sums.values()))
    with np.errstate(invalid="ignore", divide="ignore"):
        errors = np.sqrt(stacked[..., 0] / stacked[..., 1])
    errors[~np.isfinite(errors)] = np.nan
    return LayerErrors(tuple(sums), tuple(step.timestep for step in steps), errors)

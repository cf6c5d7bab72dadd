"""What a quantizer for each branch of a concatenation gains (Q-Diffusion, 2302.04304, section 3.3), beside balancing.

    python benchmarks/skip_branches.py                      # bundled model
    python benchmarks/skip_branches.py training/colours

The layers of a U-Net that read a concatenation of the way up with a skip connection: `conv_shortcut` as it is, `conv1`
behind normalization and SiLU. On a sample of what the float network hands them, E ||W (x - x_q)||^2 / E ||W x||^2 with

    one       one 8-bit range for all channels, as PTQ4DM has
    branches  a range of its own for each of the two branches
    balanced  one range behind the balancing of input channels that `best` would choose (`octavo.calibration.balance`)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from activation_error import best, options_of, sampled
from torch.overrides import TorchFunctionMode

import octavo
from octavo.calibration import balance
from octavo.calibration.rules import LayerRule
from octavo.diffusion import first_call
from octavo.quantization import HistogramObserver, fake_quantize


class Joined(TorchFunctionMode):
    """Notes the widths of the last concatenation of channels."""

    widths: tuple[int, ...] = ()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.cat and result.ndim == 4:
            self.widths = tuple(part.shape[1] for part in args[0])
        return result


def splits(pipeline: Any) -> dict[str, int]:
    """Resnet -> channels of the way up in front of those of the skip connection, for each that reads both."""
    found: dict[str, int] = {}
    joined = Joined()

    def look(name: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            if len(joined.widths) == 2 and args[0].shape[1] == sum(joined.widths):
                found[name] = joined.widths[0]
            joined.widths = ()

        return hook

    resnets = {
        name: module for name, module in pipeline.unet.named_modules() if hasattr(module, "conv_shortcut")
    }
    hooks = [module.register_forward_pre_hook(look(name)) for name, module in resnets.items()]
    _, kwargs = first_call(pipeline)
    with torch.inference_mode(), joined:
        pipeline.unet(**kwargs)
    for hook in hooks:
        hook.remove()
    return found


def error(layer: Any, inputs: list[torch.Tensor], rule: LayerRule, borders: list[int]) -> float:
    """Mean squared output error of rounding the channels between neighbouring borders in a range of their own."""
    parts = list(zip([0, *borders], [*borders, inputs[0].shape[1]], strict=True))
    ranges = []
    for low, high in parts:
        observer = HistogramObserver()
        for x in inputs:
            observer.observe(x[:, low:high])
        ranges.append(observer.qparams(rule.activations, "mse"))
    found = []
    for x in inputs:
        rounded = [
            fake_quantize(x[:, low:high], qparams, rule.activations)
            for (low, high), qparams in zip(parts, ranges, strict=True)
        ]
        difference = balance._apply(layer, x - torch.cat(rounded, dim=1), layer.weight.detach())
        found.append(float(difference.square().mean()))
    return float(np.mean(found))


def main() -> None:
    options = options_of(__doc__)
    pipeline = octavo.load(options.model)
    layers, rules, inputs = sampled(pipeline, options.samples)
    borders = {
        f"{resnet}.{layer}": border
        for resnet, border in splits(pipeline).items()
        for layer in ("conv1", "conv_shortcut")
    }
    layers = {name: layer for name, layer in layers.items() if name in borders}
    rows: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        for name, layer in layers.items():
            given, rule = inputs[name], rules[name]
            power = np.mean(
                [float(balance._apply(layer, x, layer.weight.detach()).square().mean()) for x in given]
            )
            found = {
                "one": error(layer, given, rule, []),
                "branches": error(layer, given, rule, [borders[name]]),
                "balanced": best(layer, given, balance._candidates([(layer, given, rule)]), rule),
            }
            rows[name] = {key: value / float(power) for key, value in found.items()}
            shares = {key: f"{value / rows[name]['one']:.2f}" for key, value in rows[name].items()}
            print(f"{name:<40} {rows[name]['one']:.1e} {shares}", flush=True)
    means = {
        kind: {
            key: float(
                np.exp(np.mean([np.log(row[key] / row["one"]) for name, row in rows.items() if kind in name]))
            )
            for key in ("branches", "balanced")
        }
        for kind in ("conv_shortcut", "conv1")
    }
    print("geometric means of the error over that of one range:", means)
    peers.save(f"skip_branches_{Path(options.model).name}", {**vars(options), "layers": rows, "means": means})


if __name__ == "__main__":
    main()

"""What might lower the error of 8-bit activations further: a shift of each channel, other measures of a channel's size.

    python benchmarks/activation_error.py training/colours

For each layer of `best`, on a sample of the inputs that the float network hands it: E ||W (x - x_q)||^2 of the best
strength of balancing, relative to E ||W x||^2, as balancing is (`octavo.calibration.balance`) and

    shifted       x - z with z[j] the middle of channel j's range, cut at 1e-4 (Outlier Suppression+, 2304.09145); W z
                  would go into the bias, and of a padded convolution into a map of the bias
    by L8, 99.9 % balancing by (E x_j^8)^(1/8) or by the 99.9 % quantile of |x_j| in place of max |x_j|, and by the root
                  of the mean square of the weights in place of their largest
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch

import octavo
from octavo.calibration import balance, collect_pairs, trace
from octavo.calibration.rules import LayerRule, rules_of
from octavo.quantization import HistogramObserver, fake_quantize, round_nearest, walk
from octavo.quantization.balancing import divided_weight, multiplied_input

GPTQ = balance.WEIGHT_SHARE["gptq"]


def errors(layer: Any, inputs: list[torch.Tensor], m: torch.Tensor, rule: LayerRule) -> tuple[float, float]:
    """Mean squared output errors of rounding the inputs and of rounding the weights to nearest."""
    weight = layer.weight.detach()
    observer = HistogramObserver()
    for x in inputs:
        observer.observe(multiplied_input(x, m, weight.ndim))
    qparams = observer.qparams(rule.activations, "mse")
    balanced = divided_weight(weight, m)
    integers, of_weight = round_nearest(balanced, rule.weights, "mse")
    rounded = integers.float() * of_weight.scale.view(-1, *[1] * (weight.ndim - 1))
    found = []
    for x in inputs:
        scaled = multiplied_input(x, m, weight.ndim)
        quantized = fake_quantize(scaled, qparams, rule.activations)
        found.append(
            [
                float(balance._apply(layer, scaled - quantized, balanced).square().mean()),
                float(balance._apply(layer, quantized, balanced - rounded).square().mean()),
            ]
        )
    activations, weights = np.mean(found, axis=0)
    return float(activations), float(weights)


def best(layer: Any, inputs: list[torch.Tensor], candidates: list[torch.Tensor], rule: LayerRule) -> float:
    """The activations' error with the candidate of the least error in all."""
    found = [errors(layer, inputs, m, rule) for m in candidates]
    return min(found, key=lambda pair: pair[0] + GPTQ * pair[1])[0]


def variants(layer: Any, inputs: list[torch.Tensor], rule: LayerRule) -> dict[str, float]:
    weight = layer.weight.detach()
    values = torch.cat([balance._by_channel(x, weight) for x in inputs], dim=1)
    cut = max(1, values.shape[1] // 10_000)
    middle = (values.topk(cut).values[:, -1] - (-values).topk(cut).values[:, -1]) / 2
    shifted = [
        x - (middle if weight.ndim == 2 else middle.view(-1, *[1] * (weight.ndim - 2))) for x in inputs
    ]
    by_weight = weight.transpose(0, 1).flatten(1).square().mean(dim=1).sqrt()
    sizes: dict[str, Callable[[], torch.Tensor]] = {
        "by L8": lambda: values.double().pow(8).mean(dim=1).pow(1 / 8).float(),
        "by 99.9 %": lambda: values.abs().topk(max(1, values.shape[1] // 1000)).values[:, -1],
    }
    plain = balance._candidates([(layer, inputs, rule)])
    power = np.mean([float(balance._apply(layer, x, weight).square().mean()) for x in inputs])
    found = {
        "balanced": best(layer, inputs, plain, rule),
        "shifted": best(layer, shifted, balance._candidates([(layer, shifted, rule)]), rule),
    }
    for name, size in sizes.items():
        others = [balance._multiplier(size(), by_weight, strength) for strength in balance.STRENGTHS]
        found[name] = best(layer, inputs, [plain[0], *others], rule)
    return {name: error / float(power) for name, error in found.items()}


def sampled(pipeline: Any, samples: int) -> tuple[dict[str, Any], dict[str, LayerRule], dict[str, Any]]:
    """The layers that `best` quantizes by name, their rules, and a sample of what the float network hands each."""
    recipe = octavo.named_recipe("best", samples=samples, steps=50)
    rules = rules_of(recipe, trace(pipeline))
    layers = {name: layer for name, layer in walk(pipeline.unet) if name in rules}
    with tempfile.TemporaryDirectory() as folder:
        pairs = collect_pairs(pipeline, recipe, Path(folder), batch_size=16, progress=False)
        inputs = balance.sample_inputs(pipeline.unet, pairs, layers, progress=False)
    return layers, rules, inputs


def options_of(description: str | None) -> argparse.Namespace:
    """The model and the number of samples that a command line asks for."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="digits", help="an unconditional pipeline with a `unet`")
    parser.add_argument("--samples", type=int, default=96)
    return parser.parse_args()


def main() -> None:
    options = options_of(__doc__)
    layers, rules, inputs = sampled(octavo.load(options.model), options.samples)
    rows: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        for name, layer in layers.items():
            rows[name] = variants(layer, inputs[name], rules[name])
            ratios = {key: f"{value / rows[name]['balanced']:.2f}" for key, value in rows[name].items()}
            print(f"{name:<40} {rows[name]['balanced']:.1e} {ratios}", flush=True)
    is_padded = {name: bool(np.any(getattr(layer, "padding", 0))) for name, layer in layers.items()}
    means = {
        kind: {
            key: float(
                np.exp(
                    np.mean(
                        [
                            np.log(row[key] / row["balanced"])
                            for name, row in rows.items()
                            if is_padded[name] == of
                        ]
                    )
                )
            )
            for key in next(iter(rows.values()))
        }
        for kind, of in (("padded convolutions", True), ("other layers", False))
    }
    print("geometric means of the ratio to balancing as it is:", means)
    peers.save(
        f"activation_error_{Path(options.model).name}", {**vars(options), "layers": rows, "means": means}
    )


if __name__ == "__main__":
    main()

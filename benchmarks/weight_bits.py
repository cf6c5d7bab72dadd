"""What 7-bit weights cost: they run in one integer kernel on every CPU, 8-bit ones only where there is VNNI.

    python benchmarks/weight_bits.py

Each recipe at 8 and at 7 weight bits on the same calibration pairs, the same images in real int8 (f32 remainder; sums
are exact at both widths, `octavo.runtimes.saturation`). PSNR: to fp32, same seeds, the mean with its 95 % interval over
images; "7 - 8": the paired difference.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import peers
import torch

import octavo
from octavo.calibration import collect_pairs, observe, quantize_observed, trace
from octavo.evaluation.generate import generate
from octavo.evaluation.intervals import mean_estimate
from octavo.evaluation.similarity import psnr

BATCH = 32


def interval(values: np.ndarray) -> tuple[float, float]:
    estimate = mean_estimate(values)
    return round(estimate.value, 2), round((estimate.high - estimate.low) / 2, 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-images", type=int, default=128)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the calibration")
    parser.add_argument("--recipes", nargs="+", default=["best", "ptq4dm"])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 7])
    options = parser.parse_args()

    original = octavo.load("digits")
    original.set_progress_bar_config(disable=True)
    traced = trace(original)

    def sample(pipeline: object) -> np.ndarray:
        fast = octavo.accelerate(pipeline, precision="f32", batch_size=BATCH, threads=torch.get_num_threads())
        return generate(fast, options.num_images, steps=options.steps, seed=70_000, batch_size=BATCH)

    reference = sample(original)
    rows = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            plain = octavo.named_recipe("ptq4dm", samples=options.samples, steps=options.steps)
            pairs = collect_pairs(original, plain, Path(folder), seed=seed, batch_size=BATCH)
            seen = observe(original.unet, pairs)
            for name in options.recipes:
                decibels = {}
                for bits in options.bits:
                    recipe = octavo.named_recipe(
                        name, samples=options.samples, steps=options.steps, weights=bits
                    )
                    quantized = quantize_observed(original, recipe, seen, traced, pairs=pairs, seed=seed)
                    decibels[bits] = np.minimum(psnr(sample(quantized), reference), 100.0)
                first = options.bits[0]
                row = {
                    "recipe": name,
                    "seed": seed,
                    **{f"W{bits}A8": interval(values) for bits, values in decibels.items()},
                    **{
                        f"{bits} - {first}": interval(values - decibels[first])
                        for bits, values in decibels.items()
                        if bits != first
                    },
                }
                rows.append(row)
                print(row, flush=True)
    peers.save("weight_bits", {**vars(options), "rows": rows})


if __name__ == "__main__":
    main()

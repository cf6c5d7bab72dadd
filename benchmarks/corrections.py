"""Do corrections of the mean error make `best` steadier from one calibration to another?

    python benchmarks/corrections.py

The recipe with no correction, with bias correction, with output correction, and with both, on the same calibration
pairs and rounded alike, the same images in real int8 (f32 remainder). PSNR: to fp32, same seeds, the mean with its 95 %
interval over images; "gain": the paired difference from no correction.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import peers
import torch
from weight_bits import BATCH, interval

import octavo
from octavo.calibration import collect_pairs, observe, quantize_observed, trace
from octavo.evaluation.generate import generate
from octavo.evaluation.similarity import psnr

CORRECTIONS = {
    "none": {},
    "bias": {"bias_correction": True},
    "output": {"output_correction": True},
    "both": {"bias_correction": True, "output_correction": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the calibration")
    parser.add_argument("--recipe", default="best")
    parser.add_argument("--bits", type=int, nargs="+", default=[7, 8])
    parser.add_argument("--corrections", nargs="+", default=list(CORRECTIONS), choices=list(CORRECTIONS))
    parser.add_argument("--name", default="corrections", help="of the file in results/")
    options = parser.parse_args()

    original = octavo.load("digits")
    original.set_progress_bar_config(disable=True)
    traced = trace(original)

    def sample(pipeline: object) -> np.ndarray:
        fast = octavo.accelerate(pipeline, precision="f32", batch_size=BATCH, threads=torch.get_num_threads())
        return generate(
            fast, options.num_images, steps=options.steps, seed=70_000, batch_size=BATCH, progress=False
        )

    reference = sample(original)
    rows = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            plain = octavo.named_recipe("ptq4dm", samples=options.samples, steps=options.steps)
            pairs = collect_pairs(original, plain, Path(folder), seed=seed, batch_size=BATCH, progress=False)
            seen = observe(original.unet, pairs, progress=False)
            for bits in options.bits:
                recipe = octavo.named_recipe(
                    options.recipe, samples=options.samples, steps=options.steps, weights=bits
                )
                decibels = {}
                for name in options.corrections:
                    corrected = dataclasses.replace(recipe, **CORRECTIONS[name])
                    quantized = quantize_observed(original, corrected, seen, traced, pairs=pairs, seed=seed)
                    decibels[name] = np.minimum(psnr(sample(quantized), reference), 100.0)
                    row = {"bits": bits, "seed": seed, "correction": name, "psnr": interval(decibels[name])}
                    if name != options.corrections[0]:
                        row["gain"] = interval(decibels[name] - decibels[options.corrections[0]])
                    rows.append(row)
                    print(row, flush=True)
                    peers.save(options.name, {**vars(options), "rows": rows})


if __name__ == "__main__":
    main()

"""What the recipe's defaults rest on: cost and final quality of each choice, on the bundled model.

    python benchmarks/choose_defaults.py

Each row changes one thing of the default recipe (256 samples, steps=50) and samples the same images in int8 (f32
remainder). PSNR: to fp32, same seeds. Cost: network evaluations of single images while collecting pairs. "ranges":
median over layers of |log(input scale / input scale of the first row)|. Rows that share their pairs collect once.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import peers

import octavo
from octavo.calibration import collect_pairs, observe, quantize_denoiser, rules_of, trace
from octavo.calibration.collect import plan_batches
from octavo.diffusion import NDTC, with_denoiser
from octavo.evaluation.generate import generate
from octavo.evaluation.intervals import mean_estimate
from octavo.evaluation.similarity import psnr
from octavo.quantization import quantized_layers

STEPS = 50
BATCH = 32
OTHER_SEED = 1_000_000
ROWS: dict[str, dict[str, object]] = {
    "256 samples": {},
    "256 samples, other seed": {"seed": OTHER_SEED},
    "symmetric s8": {"symmetric": True},
    "time embedding float": {"exclude": ("time_embedding.*", "*.time_emb_proj")},
    "first and last quantized": {"first_and_last": "quantized"},
    "minmax": {"metric": "minmax"},
    "128 samples": {"samples": 128},
    "64 samples": {"samples": 64},
    "16 samples": {"samples": 16},
    "256 samples, 4 a trajectory": {"pairs_per_trajectory": 4},
    "256 samples, 16 a trajectory": {"pairs_per_trajectory": 16},
    "1024 samples, 16 a trajectory": {"samples": 1024, "pairs_per_trajectory": 16},
    "std sqrt(T/2)": {"timesteps": NDTC(std="sqrt")},
    "uniform": {"timesteps": "uniform"},
    "512 samples": {"samples": 512},
}


def scales(denoiser: object) -> dict[str, float]:
    return {name: float(layer.input_scale) for name, layer in quantized_layers(denoiser)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-images", type=int, default=64)
    options = parser.parse_args()
    original = octavo.load("digits")
    original.set_progress_bar_config(disable=True)
    traced = trace(original)

    def sample(pipeline: object) -> np.ndarray:
        fast = octavo.accelerate(pipeline, precision="f32", batch_size=BATCH)
        return generate(fast, options.num_images, steps=STEPS, seed=50_000, batch_size=BATCH, progress=False)

    reference = sample(original)
    rows = []
    observed: dict[object, object] = {}
    finest: dict[str, float] = {}
    for name, change in ROWS.items():
        seed = int(change.get("seed", 0))
        fields = {key: value for key, value in change.items() if key != "seed"}
        recipe = octavo.PTQ4DM(**{"samples": 256, "steps": STEPS, "pairs_per_trajectory": 1, **fields})
        plan = plan_batches(recipe, STEPS, seed, BATCH)
        evaluations = sum(batch.evaluations * len(batch.images) for batch in plan)
        key = (seed, recipe.distribution, recipe.samples, recipe.pairs_per_trajectory)
        if key not in observed:
            with tempfile.TemporaryDirectory() as folder:
                store = collect_pairs(
                    original, recipe, Path(folder), seed=seed, batch_size=BATCH, progress=False
                )
                observed[key] = observe(original.unet, store, progress=False)
        rules = rules_of(recipe, traced)
        unet = quantize_denoiser(original.unet, recipe, rules, {}, observed[key])
        finest = finest or scales(unet)
        change_of_ranges = np.median(
            [abs(np.log(s / finest[k])) for k, s in scales(unet).items() if k in finest]
        )
        values = psnr(sample(with_denoiser(original, "unet", unet)), reference)
        estimate = mean_estimate(np.minimum(values, 100.0))
        mean, half = estimate.value, (estimate.high - estimate.low) / 2
        rows.append(
            {
                "recipe": name,
                "evaluations": evaluations,
                "psnr": round(mean, 2),
                "interval_95": round(half, 2),
                "ranges": round(float(change_of_ranges), 4),
            }
        )
        print(
            f"{name:<32} {evaluations:6d} evaluations  PSNR {mean:.2f} +- {half:.2f}  ranges {change_of_ranges:.4f}"
        )
    peers.save("defaults", {"num_images": options.num_images, "rows": rows})


if __name__ == "__main__":
    main()

"""What the recipe's defaults rest on: cost and final quality of each choice, on the bundled model.

    python benchmarks/choose_defaults.py

Each row changes one thing of the default recipe (steps=50), is calibrated with two seeds, and samples the same
images in int8 (f32 remainder). PSNR: to torch fp32, same seeds. Cost: network evaluations of single images while
collecting pairs. "range change": median over layers of |log(scale / scale of the 1,024-sample recipe)|.
"""

from __future__ import annotations

import argparse
import tempfile

import numpy as np
import peers

import octavo
from octavo.calibration.collect import plan_batches
from octavo.diffusion import NDTC
from octavo.evaluation.generate import generate
from octavo.evaluation.similarity import mean_interval, psnr
from octavo.quantization import quantized_layers

STEPS = 50
BATCH = 32
ROWS: dict[str, dict[str, object]] = {
    "1024 samples": {"samples": 1024},
    "512 samples": {"samples": 512},
    "256 samples": {},
    "128 samples": {"samples": 128},
    "64 samples": {"samples": 64},
    "16 samples": {"samples": 16},
    "256 samples, 4 a trajectory": {"pairs_per_trajectory": 4},
    "256 samples, 16 a trajectory": {"pairs_per_trajectory": 16},
    "1024 samples, 16 a trajectory": {"samples": 1024, "pairs_per_trajectory": 16},
    "symmetric s8": {"symmetric": True},
    "time embedding float": {"exclude": ("time_embedding.*", "*.time_emb_proj")},
    "first and last quantized": {"first_and_last": "quantized"},
    "minmax": {"metric": "minmax"},
    "std sqrt(T/2)": {"timesteps": NDTC(std="sqrt")},
    "uniform": {"timesteps": "uniform"},
}


def scales(pipeline: object) -> dict[str, float]:
    return {name: float(layer.input_scale) for name, layer in quantized_layers(pipeline.unet)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-images", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1_000_000])
    options = parser.parse_args()
    original = octavo.load("digits")
    original.set_progress_bar_config(disable=True)
    fp32 = octavo.accelerate(original, precision="f32", batch_size=BATCH)

    def sample(pipeline: object) -> np.ndarray:
        return generate(
            pipeline, options.num_images, steps=STEPS, seed=50_000, batch_size=BATCH, progress=False
        )

    reference = sample(fp32)
    rows = []
    finest: dict[str, float] = {}
    for name, change in ROWS.items():
        recipe = octavo.PTQ4DM(**{"samples": 256, "steps": STEPS, **change})
        plan = plan_batches(recipe, STEPS, 0, BATCH)
        evaluations = sum(batch.evaluations * len(batch.images) for batch in plan)
        means, halves, changes = [], [], []
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as workdir:
                quantized = octavo.quantize(
                    original, recipe, seed=seed, batch_size=BATCH, workdir=workdir, progress=False
                )
            finest = finest or scales(quantized)
            changes.append(
                float(
                    np.median(
                        [abs(np.log(s / finest[k])) for k, s in scales(quantized).items() if k in finest]
                    )
                )
            )
            fast = octavo.accelerate(quantized, precision="f32", batch_size=BATCH)
            mean, half = mean_interval(np.minimum(psnr(sample(fast), reference), 100.0))
            means.append(round(mean, 2))
            halves.append(round(half, 2))
        rows.append(
            {
                "recipe": name,
                "evaluations": evaluations,
                "psnr": means,
                "interval_95": halves,
                "range_change": changes,
            }
        )
        print(
            f"{name:<32} {evaluations:7d} evaluations  PSNR {means} +- {halves}  ranges {changes}", flush=True
        )
    peers.save("defaults", {"num_images": options.num_images, "seeds": options.seeds, "rows": rows})


if __name__ == "__main__":
    main()

"""What each step of the recipes contributes: added alone to the plain recipe, taken from or added to the others.

    python benchmarks/contributions.py digits
    python benchmarks/contributions.py training/colours

All on the same calibration pairs, the same images in real int8 (f32 remainder). PSNR: to fp32, same seeds, the mean
over images and calibration seeds; "gain": the paired difference from the recipe that the step was added to or taken
from, with its 95 % interval over images (each image the mean over calibration seeds), and its value for each seed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from weight_bits import BATCH, interval

import octavo
from octavo.calibration import collect_pairs, observe, quantize_observed, trace
from octavo.evaluation.generate import generate
from octavo.evaluation.similarity import psnr

CHANGES: dict[str, dict[str, Any]] = {
    "+ GPTQ rounding": {"rounding": "gptq"},
    "+ balancing": {"balance": True},
    "+ bias correction": {"bias_correction": True},
    "+ output correction": {"output_correction": True},
    "+ both corrections": {"bias_correction": True, "output_correction": True},
    "+ float time embedding": {"time_embedding": "float"},
    "+ both corrections, float time embedding": {
        "bias_correction": True,
        "output_correction": True,
        "time_embedding": "float",
    },
    "+ int8 attention products": {"attention_matmuls": True},
    "+ scales for 32 columns": {"group_size": 32},
    "+ sub-pixel convolutions": {"sub_pixel": True},
    "- sub-pixel convolutions": {"sub_pixel": False},
    "+ float activations": {"float_activations": 0.1},
    "+ float activations of the timestep's layers": {"time_embedding": "weights"},
    "- float activations": {"float_activations": 0.0},
    "- float activations of the timestep's layers": {"time_embedding": "quantized"},
    "- GPTQ rounding": {"rounding": "nearest"},
    "- balancing": {"balance": False},
    "- range search (min-max)": {"metric": "minmax"},
    "- float edges": {"first_and_last": "quantized"},
}
PLAIN = [
    "+ sub-pixel convolutions",
    "+ GPTQ rounding",
    "+ balancing",
    "+ bias correction",
    "+ output correction",
    "+ float activations",
    "+ float activations of the timestep's layers",
    "- range search (min-max)",
    "- float edges",
]
BEST = [
    "- sub-pixel convolutions",
    "- float activations",
    "- float activations of the timestep's layers",
    "- GPTQ rounding",
    "- balancing",
    "- range search (min-max)",
    "- float edges",
    "+ bias correction",
    "+ output correction",
    "+ both corrections",
    "+ float time embedding",
    "+ both corrections, float time embedding",
    "+ int8 attention products",
]
FOUR = [
    "- sub-pixel convolutions",
    "- GPTQ rounding",
    "- balancing",
    "+ bias correction",
    "+ output correction",
    "+ float activations",
    "+ float activations of the timestep's layers",
    "+ scales for 32 columns",
]
STEPS = {"ptq4dm": PLAIN, "best": BEST, "w4a8": FOUR}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="digits", help="an unconditional pipeline with a `unet`")
    parser.add_argument("--num-images", type=int, default=96)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the calibration")
    parser.add_argument("--recipes", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--changes", nargs="+", choices=list(CHANGES), help="default: all that a recipe has")
    parser.add_argument("--name", help="of the file in results/ (default: contributions_MODEL)")
    options = parser.parse_args()

    wanted = options.changes or list(CHANGES)
    original = octavo.load(options.model)
    original.set_progress_bar_config(disable=True)
    traced = trace(original)

    def sample(pipeline: Any) -> np.ndarray:
        fast = octavo.accelerate(pipeline, precision="f32", batch_size=BATCH, threads=torch.get_num_threads())
        return generate(
            fast, options.num_images, steps=options.steps, seed=70_000, batch_size=BATCH, progress=False
        )

    reference = sample(original)
    found: dict[tuple[str, str], list[np.ndarray]] = {}
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            plain = octavo.named_recipe("ptq4dm", samples=options.samples, steps=options.steps)
            pairs = collect_pairs(original, plain, Path(folder), seed=seed, batch_size=BATCH, progress=False)
            seen = observe(original.unet, pairs, progress=False)
            for recipe_name in options.recipes:
                for step in ("", *(step for step in STEPS[recipe_name] if step in wanted)):
                    changes = {"samples": options.samples, "steps": options.steps, **CHANGES.get(step, {})}
                    recipe = octavo.named_recipe(recipe_name, **changes)
                    quantized = quantize_observed(original, recipe, seen, traced, pairs=pairs, seed=seed)
                    decibels = np.minimum(psnr(sample(quantized), reference), 100.0)
                    found.setdefault((recipe_name, step), []).append(decibels)
                    print(seed, recipe_name, step, interval(decibels), flush=True)
        rows = table(found)
        peers.save(
            options.name or f"contributions_{Path(options.model).name}", {**vars(options), "rows": rows}
        )
    for row in rows:
        print(row)


def table(found: dict[tuple[str, str], list[np.ndarray]]) -> list[dict[str, Any]]:
    """A row for each recipe and step."""
    rows = []
    for (recipe, step), seeds in found.items():
        row: dict[str, Any] = {"recipe": recipe, "step": step, "psnr": interval(np.mean(seeds, axis=0))}
        if step:
            gains = [values - base for values, base in zip(seeds, found[recipe, ""], strict=True)]
            row["gain"] = interval(np.mean(gains, axis=0))
            row["gain_by_seed"] = [round(float(gain.mean()), 2) for gain in gains]
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()

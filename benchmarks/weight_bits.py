"""What weights cost that run in one integer kernel on every CPU: 7 bits, or 8 bits in pairs within a limit.

    python benchmarks/weight_bits.py --weights 8 8-pairs 7 --name pair_limit        # fidelity
    python benchmarks/weight_bits.py --weights 8 8-pairs 7 --rounds 13 --name pair_limit_speed

Each recipe at each kind of weights on the same calibration pairs, the same images in real int8 (f32 remainder; sums are
exact for all: on CPUs without VNNI plain 8-bit weights take two kernels a layer, `octavo.runtimes.saturation`). PSNR:
to fp32, same seeds, the mean with its 95 % interval over images; "7 - 8": the paired difference. With `--rounds`: no
images, but one evaluation of each in turn, beside OpenVINO's and torch eager fp32, speeds over the latter.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch

import octavo
from octavo.calibration import collect_pairs, observe, quantize_observed, trace
from octavo.evaluation.generate import generate
from octavo.evaluation.intervals import mean_estimate
from octavo.evaluation.peers import Task, build
from octavo.evaluation.similarity import psnr
from octavo.evaluation.speed import format_table, table, take_turns

BATCH = 32
WEIGHTS: dict[str, dict[str, Any]] = {
    "8": {"weights": 8},
    "8-pairs": {"weights": 8, "pair_limit": True},
    "7": {"weights": 7},
}


def interval(values: np.ndarray) -> tuple[float, float]:
    estimate = mean_estimate(values)
    return round(estimate.value, 2), round((estimate.high - estimate.low) / 2, 2)


def fidelity(images: dict[str, np.ndarray], reference: np.ndarray) -> dict[str, Any]:
    decibels = {key: np.minimum(psnr(mine, reference), 100.0) for key, mine in images.items()}
    first, *others = decibels
    return {
        **{f"W{key}A8": interval(values) for key, values in decibels.items()},
        **{f"{key} - {first}": interval(decibels[key] - decibels[first]) for key in others},
    }


def speeds(original: Any, made: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    size = original.unet.config.sample_size
    kwargs = {"sample": torch.randn(BATCH, original.unet.config.in_channels, size, size), "timestep": 500}
    threads = torch.get_num_threads()
    fast = {
        key: octavo.accelerate(pipeline, precision="f32", batch_size=BATCH, threads=threads).unet
        for key, pipeline in made.items()
    }
    with torch.inference_mode():
        engines = build(("torch eager fp32", "openvino fp32"), Task(original.unet, kwargs, [kwargs])).engines
        engines |= {f"W{key}A8": lambda unet=unet: unet(**kwargs) for key, unet in fast.items()}
        rows = table(take_turns(engines, rounds=rounds, warm_up=2), "torch eager fp32")
    print(format_table(rows, "evaluation", "torch eager fp32"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="digits", help="an unconditional U-Net's pipeline")
    parser.add_argument("--num-images", type=int, default=128)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the calibration")
    parser.add_argument("--recipes", nargs="+", default=["best", "ptq4dm"])
    parser.add_argument("--weights", nargs="+", default=["8", "7"], choices=WEIGHTS)
    parser.add_argument("--rounds", type=int, default=0, help="measure speed instead")
    parser.add_argument("--name", default="weight_bits", help="of the file of results")
    options = parser.parse_args()

    original = octavo.load(options.model)
    original.set_progress_bar_config(disable=True)
    traced = trace(original)

    def sample(pipeline: object) -> np.ndarray:
        fast = octavo.accelerate(pipeline, precision="f32", batch_size=BATCH, threads=torch.get_num_threads())
        return generate(fast, options.num_images, steps=options.steps, seed=70_000, batch_size=BATCH)

    reference = None if options.rounds else sample(original)
    rows = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            plain = octavo.named_recipe("ptq4dm", samples=options.samples, steps=options.steps)
            pairs = collect_pairs(original, plain, Path(folder), seed=seed, batch_size=BATCH)
            seen = observe(original.unet, pairs)
            for name in options.recipes:
                made = {}
                for weights in options.weights:
                    recipe = octavo.named_recipe(
                        name, samples=options.samples, steps=options.steps, **WEIGHTS[weights]
                    )
                    made[weights] = quantize_observed(original, recipe, seen, traced, pairs=pairs, seed=seed)
                row = {"recipe": name, "seed": seed}
                if options.rounds:
                    row["speed"] = speeds(original, made, options.rounds)
                else:
                    row |= fidelity({key: sample(pipeline) for key, pipeline in made.items()}, reference)
                rows.append(row)
                print(row, flush=True)
    peers.save(options.name, {**vars(options), "rows": rows})


if __name__ == "__main__":
    main()

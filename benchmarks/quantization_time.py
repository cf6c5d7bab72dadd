"""How long quantizing takes by each recipe, on the DDPM CIFAR-10 architecture: what comes on top of the paper's.

    python benchmarks/quantization_time.py

Random weights. 256 calibration pairs are collected and observed once, in few steps, for all recipes alike; timed is
what follows, in turn: ranges, rounding, balancing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import peers

import octavo
from octavo.calibration import RECIPES, collect_pairs, observe, quantize_observed, trace
from octavo.evaluation.peers.architectures import ARCHITECTURES, architecture

LIMIT = 300.0
"""Seconds that `best` may take longer than `ptq4dm`; more is too long to wait for."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architecture", default="ddpm-cifar10", choices=list(ARCHITECTURES))
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument(
        "--steps", type=int, default=8, help="of the sampler that the pairs are collected along"
    )
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    pipeline = architecture(options.architecture)
    settings = {"samples": options.samples, "steps": options.steps}
    seconds: dict[str, list[float]] = {name: [] for name in RECIPES}
    with tempfile.TemporaryDirectory() as folder:
        plain = octavo.named_recipe("ptq4dm", **settings)
        start = time.perf_counter()
        pairs = collect_pairs(pipeline, plain, Path(folder), batch_size=16)
        seen = observe(pipeline.unet, pairs)
        before = time.perf_counter() - start
        traced = trace(pipeline)
        for _ in range(options.rounds):
            for name, taken in seconds.items():
                start = time.perf_counter()
                quantize_observed(pipeline, octavo.named_recipe(name, **settings), seen, traced, pairs=pairs)
                taken.append(round(time.perf_counter() - start, 1))
                print(f"{name}: {taken[-1]} s", flush=True)
    extra = statistics.median(seconds["best"]) - statistics.median(seconds["ptq4dm"])
    print(
        f"pairs and observation {before:.0f} s; best takes {extra:.0f} s longer than ptq4dm (asked: {LIMIT:.0f})"
    )
    peers.save(
        "quantization_time",
        {**vars(options), "pairs_s": round(before, 1), "seconds": seconds, "extra_s": extra},
    )


if __name__ == "__main__":
    main()

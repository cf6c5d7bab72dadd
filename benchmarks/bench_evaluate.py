"""What share of `octavo evaluate` is not spent in the networks: 2,000 images of the bundled model, int8 and fp32.

    python benchmarks/bench_evaluate.py         # DDIM-50; asked: under 10 %

The command runs as a user runs it, in a process of its own. Network: all evaluations of both denoisers while the images
are generated, and those of the measurement of latency. Everything else: starting Python, loading, converting, the
samplers, files, features, figures and tests, the processes that measure memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import peers

import octavo

TIMES = "OCTAVO_BENCH_TIMES"
TIMED = """
import atexit, json, os, time
from octavo.evaluation import generate, shards, cost
from octavo.diffusion import find_denoiser
from octavo.cli import evaluate_costs, evaluate_models, main

spent = {"network": 0.0}

def timed(pipeline):
    # every call of the denoiser, engine or torch, by its own forward
    _, denoiser = find_denoiser(pipeline)
    forward = denoiser.forward
    def clocked(*args, **kwargs):
        start = time.perf_counter()
        try:
            return forward(*args, **kwargs)
        finally:
            spent["network"] += time.perf_counter() - start
    denoiser.__dict__["forward"] = clocked
    return forward

generate_shards, latency = evaluate_models.generate_shards, evaluate_costs.latency

def shards_timed(pipeline, *args, **kwargs):
    sample = shards.sample
    def sample_timed(pipeline, *arguments, **options):
        _, denoiser = find_denoiser(pipeline)
        had = denoiser.__dict__.get("forward")
        timed(pipeline)
        try:
            return sample(pipeline, *arguments, **options)
        finally:
            del denoiser.__dict__["forward"]
            if had is not None:
                denoiser.__dict__["forward"] = had
    shards.sample = sample_timed
    try:
        return generate_shards(pipeline, *args, **kwargs)
    finally:
        shards.sample = sample

def latency_timed(*args, **kwargs):
    start = time.perf_counter()
    try:
        return latency(*args, **kwargs)
    finally:
        spent["network"] += time.perf_counter() - start

evaluate_models.generate_shards, evaluate_costs.latency = shards_timed, latency_timed
atexit.register(lambda: open(os.environ["OCTAVO_BENCH_TIMES"], "w").write(json.dumps(spent)))
main()
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--samples", type=int, default=256)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        model, times = Path(folder) / "digits-int8", Path(folder) / "times.json"
        recipe = octavo.PTQ4DM(samples=options.samples, steps=options.steps)
        octavo.quantize(octavo.load("digits"), recipe, batch_size=32).save_pretrained(model)
        command = [sys.executable, "-c", TIMED, "evaluate", str(model), "--reference", "digits", "--json"]
        command += ["--num-images", str(options.num_images), "--steps", str(options.steps)]
        command += ["--batch-size", str(options.batch_size)]
        start = time.perf_counter()
        output = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, TIMES: str(times)}
        ).stdout
        total = time.perf_counter() - start
        network = json.loads(times.read_text())["network"]
    figures = json.loads(output)
    share = 1 - network / total
    for name, seconds in {**figures["seconds"], "all": total, "network": network}.items():
        print(f"{name:<20} {seconds:8.1f} s")
    print(f"everything but the network: {100 * share:.1f} %\n{figures['verdict']}")
    record = {
        **vars(options),
        "seconds": {**figures["seconds"], "all": round(total, 2), "network": round(network, 2)},
        "share_outside_the_network": round(share, 4),
        "evaluation": figures,
    }
    peers.save("evaluate", record)


if __name__ == "__main__":
    main()

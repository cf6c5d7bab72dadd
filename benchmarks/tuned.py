"""Is a tuned int8 pipeline as good as full precision in 100 DDIM steps, and how many times faster?

    octavo tune digits --target quality=reference --out tuned --threads 1
    python benchmarks/tuned.py tuned --threads 1

Whole images of the tuned folder's pipeline in real int8 (f32 remainder) and of the bundled model in full precision,
DDIM in --reference-steps steps, in torch eager, in turn in one process: images a second, their ratio with quartiles.
FD of the digits' features to the training digits of both, and the paired difference, are those that `octavo tune`
measured on images that nothing was chosen by (tuned/tune.json).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import peers
import torch

import octavo
from octavo.diffusion import call_pipeline, generators
from octavo.diffusion.trajectories import steps_of
from octavo.evaluation.speed import format_table, table, take_turns
from octavo.files import read_json

EAGER = "torch eager fp32"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tuned", type=Path, nargs="+", help="folders of octavo tune")
    parser.add_argument("--model", default="digits", help="what was tuned")
    parser.add_argument("--reference-steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", default="tuned", help="of the file in results/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    batch, results = options.batch_size, {}

    def images(pipeline: Any, steps: int) -> Any:
        return lambda: call_pipeline(
            pipeline, generators=generators(0, 0, batch), num_inference_steps=steps, output_type="pt"
        )

    reference = octavo.load(options.model)
    reference.set_progress_bar_config(disable=True)
    engines = {f"{EAGER}, {options.reference_steps} steps": images(reference, options.reference_steps)}
    for folder in options.tuned:
        results[folder.name] = found = read_json(folder / "tune.json")
        loaded = octavo.load(str(folder / "pipeline"))
        loaded.set_progress_bar_config(disable=True)
        fast = octavo.accelerate(loaded, precision="f32", batch_size=batch, threads=options.threads)
        engines[folder.name] = images(fast, steps_of(fast, found["winner"]["steps"]))
    with torch.inference_mode():
        timings = take_turns(engines, rounds=options.rounds, warm_up=1)
    rows = table(timings, next(iter(engines)), per=batch)
    print(format_table(rows, "image", EAGER))
    kept = ("goal", "winner", "verification", "num_images")
    tuned = {name: {key: found[key] for key in kept} for name, found in results.items()}
    for name, found in tuned.items():
        winner, checked = found["winner"], found["verification"]
        print(f"{name}: {winner['recipe']}, {winner['solver']}, {winner['spacing']}, {winner['steps']} steps")
        if checked is not None:
            print({key: checked[key] for key in ("fd", "fd_reference", "difference")})
    settings = {**vars(options), "tuned": [folder.name for folder in options.tuned]}
    peers.save(options.name, {**settings, "rows": rows, "tuning": tuned})


if __name__ == "__main__":
    main()

"""What the solvers that choose their own steps cost beside those with a number of steps: FD, evaluations, seconds.

    python benchmarks/solving_costs.py [MODEL] [--rows rk45 adaptive unipc ddim ddpm] [--images 256]

Prints a row for each solver and tolerance or number of steps: Frechet distance to the bundled digits with its 95 %
interval, evaluations of the network an image, seconds an image. All on OpenVINO with an f32 remainder, from the same
seeds. RK45 and the adaptive solver go image by image, so that their network runs at batch 1.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from octavo.checkpoint import load
from octavo.diffusion.samplers import with_scheduler
from octavo.diffusion.trajectories import spaced, with_trajectory
from octavo.evaluation.features import extract
from octavo.evaluation.frechet import frechet_estimate
from octavo.evaluation.generate import generate, generate_solving, to_uint8
from octavo.evaluation.target import Target
from octavo.runtimes import accelerate

SOLVING = (
    ("rk45", (0.5, 0.1, 0.01)),
    ("adaptive", (1.0, 0.2, 0.05, 0.02)),
)
STEPPING = (("unipc", (5, 10)), ("ddim", (10, 25)), ("ddpm", (50,)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="digits")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rows", nargs="+", default=[name for name, _ in (*SOLVING, *STEPPING)])
    parser.add_argument("--tolerances", type=float, nargs="+", help="instead of those above")
    args = parser.parse_args()
    pipeline, target = load(args.model), Target.of("digits", None, (16, 16, 1))
    alone = accelerate(pipeline, precision="f32", batch_size=1)
    together = accelerate(pipeline, precision="f32", batch_size=16)

    def tell(name: str, images: Any, evaluations: float, seconds: float) -> None:
        assert target.statistics is not None
        distance = frechet_estimate(extract(target.extractor, to_uint8(images)).pooled, target.statistics)
        print(
            f"| {name} | {distance.value:.2f} ({distance.low:.2f}-{distance.high:.2f}) | {evaluations:.1f} | "
            f"{1000 * seconds / args.images:.1f} |",
            flush=True,
        )

    print("| solver | FD | evaluations an image | ms an image |\n|---|---|---|---|")
    for solver, tolerances in [row for row in SOLVING if row[0] in args.rows]:
        for tolerance in args.tolerances or tolerances:
            given = {"rtol": tolerance, "atol": tolerance if solver == "rk45" else 2 / 256}
            start = time.perf_counter()
            solved = generate_solving(alone, solver, args.images, tolerances=given, progress=False)
            seconds = time.perf_counter() - start
            mean = sum(solved.evaluations) / args.images
            tell(f"{solver}, rtol {tolerance:g}", solved.images, mean, seconds)
    for solver, counts in [row for row in STEPPING if row[0] in args.rows]:
        sampler = with_scheduler(together, solver)
        for steps in counts:
            placed = with_trajectory(sampler, spaced(sampler.scheduler, "trailing", steps))
            start = time.perf_counter()
            images = generate(placed, args.images, steps=steps, batch_size=16, progress=False)
            tell(f"{solver}, {steps} steps", images, steps, time.perf_counter() - start)


if __name__ == "__main__":
    main()

"""Deep features reused between steps, in real int8: how much faster end to end, and what becomes of the images.

    python benchmarks/reuse.py --model digits-int8 --threads 1 --rounds 0      # images alone
    python benchmarks/reuse.py --model digits-int8 --num-images 0              # speed alone, on an idle machine
    python benchmarks/reuse.py --model digits-int8 --rounds 0 --num-images 64 --orders 0 1 2 --no-fd    # PSNR alone

DDIM, the same seeds with and without reuse, f32 remainder; features reused as they are (order 0) or forecast (order 1,
2); by the plan of dynamic programming and by evenly spaced whole steps. FD to the training digits with its jackknife
interval, its paired difference from no reuse, and the paired test that both are equally far; PSNR to the images without
reuse and to full precision. Speed: whole batches in turn.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import peers
import torch

import octavo
from octavo.diffusion import call_pipeline, generators
from octavo.diffusion.reuse import ReusePlan, uniform
from octavo.evaluation.features import extract, load_features, real_statistics
from octavo.evaluation.frechet import frechet_difference, frechet_estimate
from octavo.evaluation.generate import generate, to_uint8
from octavo.evaluation.paired_test import same_distance_to
from octavo.evaluation.similarity import psnr
from octavo.evaluation.speed import format_table, table, take_turns

BATCH = 32
WHOLE = "no reuse"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a pipeline folder; without it the bundled one, quantized by `best`")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--recompute", type=int, nargs="+", default=[10, 17, 25])
    parser.add_argument("--depths", type=int, nargs="+", default=[1])
    parser.add_argument("--orders", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--spacings", nargs="+", choices=["dp", "even"], default=["dp", "even"])
    parser.add_argument("--max-age", type=int, help="most steps that features may serve")
    parser.add_argument("--seed", type=int, default=10_000, help="of the first image")
    parser.add_argument("--no-original", action="store_true", help="leave out PSNR to full precision")
    parser.add_argument("--no-fd", action="store_true", help="PSNR alone")
    parser.add_argument("--num-images", type=int, default=2048, help="0: speed alone")
    parser.add_argument("--rounds", type=int, default=5, help="0: images alone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", default="reuse", help="of the file in results/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    pipeline = octavo.load(options.model or "digits")
    pipeline.set_progress_bar_config(disable=True)
    if options.model is None:
        pipeline = octavo.quantize(pipeline, octavo.named_recipe("best"), progress=False)
    settings: dict[str, Any] = {"precision": "f32", "threads": options.threads, "batch_size": BATCH}
    plain = octavo.accelerate(pipeline, **settings)
    plans: dict[str, ReusePlan] = {}
    for depth in options.depths:
        for order in options.orders:
            costs = octavo.measure_reuse(
                plain, options.steps, depth=depth, order=order, max_age=options.max_age, progress=False
            )
            for count in options.recompute:
                plan = costs.plan(count)
                even = replace(plan, recomputed=uniform(options.steps, count))
                for name, which in (("dp", plan), ("even", even)):
                    if name in options.spacings:
                        plans[f"depth {depth}, order {order}, {count} whole, {name}"] = which
                        print(name, which, which.facts["cost"], which.facts["cost_of_uniform"], flush=True)

    def engine(name: str) -> Any:
        return plain if name == WHOLE else octavo.accelerate(pipeline, **settings, reuse=plans[name])

    names = [WHOLE, *plans]
    rows = images_of(names, engine, options) if options.num_images else {}
    speed = speed_of({name: engine(name) for name in names}, options) if options.rounds else []
    peers.save(
        options.name,
        {
            **vars(options),
            "images": rows,
            "speed": speed,
            "plans": {name: str(plan) for name, plan in plans.items()},
            "timesteps": list(next(iter(plans.values())).timesteps),
        },
    )


def images_of(
    names: list[str], engine: Callable[[str], Any], options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """FD and PSNR of each engine's images."""
    extractor, target = load_features("digits"), real_statistics("digits")
    assert target is not None
    original = octavo.accelerate(
        octavo.load("digits"), precision="f32", threads=options.threads, batch_size=BATCH
    )

    def images(pipeline: Any) -> np.ndarray:
        pipeline.set_progress_bar_config(disable=True)
        return generate(
            pipeline,
            options.num_images,
            steps=options.steps,
            seed=options.seed,
            batch_size=BATCH,
            progress=False,
        )

    full = None if options.no_original else images(original)
    plain: Any = None
    of_plain: Any = None
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        made = images(engine(name))
        plain = made if name == WHOLE else plain
        rows[name] = {} if full is None else {"psnr_to_full_precision": _mean_psnr(made, full)}
        if name != WHOLE:
            rows[name]["psnr_to_no_reuse"] = _mean_psnr(made, plain)
        if not options.no_fd:
            features = extract(extractor, to_uint8(made)).pooled
            of_plain = features if name == WHOLE else of_plain
            rows[name]["fd"] = frechet_estimate(features, target).as_json()
            if name != WHOLE:
                rows[name] |= {
                    "difference": frechet_difference(features, of_plain, target, paired=True).as_json(),
                    "p_equally_far": same_distance_to(
                        target, features, of_plain, paired=True, seed=0
                    ).p_value,
                }
        print(name, rows[name], flush=True)
        peers.save(options.name, {**vars(options), "images": rows})
    return rows


def _mean_psnr(images: np.ndarray, reference: np.ndarray) -> float:
    return round(float(np.minimum(psnr(images, reference), 100).mean()), 2)


def speed_of(engines: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Whole batches in turn."""

    def sampler(pipeline: Any) -> peers.Engine:
        pipeline.set_progress_bar_config(disable=True)
        return lambda: call_pipeline(
            pipeline, generators=generators(0, 0, BATCH), num_inference_steps=options.steps
        )

    timings = take_turns(
        {name: sampler(engine) for name, engine in engines.items()}, rounds=options.rounds, warm_up=1
    )
    rows = table(timings, WHOLE, per=BATCH)
    print(f"\nend to end, batch {BATCH}, {options.steps} steps\n{format_table(rows, 'image', WHOLE)}")
    return rows


if __name__ == "__main__":
    main()

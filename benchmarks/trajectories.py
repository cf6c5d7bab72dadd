"""Which timesteps serve a few DDIM steps best: searched on the quantized network, or spaced by formula?

    python benchmarks/trajectories.py --threads 1

The bundled model, quantized by `best`, in real int8 (f32 remainder). Trajectories are searched on it: by dynamic
programming for both costs, by descent on FD, and on a grid up to 6 steps. FD of the digits' features to the training
digits, images from seeds that no search has seen, the same for every trajectory; jackknife intervals, and the paired
difference from the best spacing. Killed and started again it goes on: searches and images stay in Octavo's cache.
"""

from __future__ import annotations

import argparse
import time

import peers
import torch

import octavo
from octavo.diffusion.trajectories import Trajectory, spaced, with_trajectory
from octavo.evaluation.features import Features, extract
from octavo.evaluation.frechet import frechet_difference, frechet_estimate
from octavo.evaluation.generate import to_uint8
from octavo.evaluation.shards import generate_shards
from octavo.evaluation.target import Target
from octavo.evaluation.trajectory_methods import SearchOptions
from octavo.evaluation.trajectory_search import search_trajectory

BATCH = 32
SPACINGS = ("leading", "trailing", "linspace", "quadratic", "karras", "beta")
SEARCHES = ("dp-trajectory", "dp-elbo", "descent-fd", "grid-trajectory", "grid-fd")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--num-images", type=int, default=2048)
    parser.add_argument("--fd-images", type=int, default=384, help="of each distance while searching")
    parser.add_argument("--max-scores", type=int, default=60)
    parser.add_argument("--spacings", nargs="+", default=list(SPACINGS), choices=list(SPACINGS))
    parser.add_argument("--searches", nargs="*", default=list(SEARCHES), choices=list(SEARCHES))
    parser.add_argument("--model", help="a pipeline folder; without it the bundled one, quantized by `best`")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", default="trajectories", help="of the file in results/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    pipeline = octavo.load(options.model or "digits")
    pipeline.set_progress_bar_config(disable=True)
    if options.model is None:
        pipeline = octavo.quantize(pipeline, octavo.named_recipe("best"), progress=False)
    fast = octavo.accelerate(pipeline, precision="f32", threads=options.threads, batch_size=BATCH)
    target = Target.of("digits", None, (16, 16, 1))
    assert target.statistics is not None
    limits = SearchOptions(fd_images=options.fd_images, max_scores=options.max_scores)

    def features(trajectory: Trajectory) -> Features:
        store = generate_shards(
            with_trajectory(fast, trajectory),
            options.num_images,
            steps=trajectory.num_steps,
            batch_size=BATCH,
            label=f"{trajectory.num_steps} {trajectory.method}",
        )
        return extract(target.extractor, to_uint8(store.images()))

    rows: list[dict[str, object]] = []
    for steps in options.steps:
        trajectories = {name: spaced(fast.scheduler, name, steps) for name in options.spacings}
        seen = {name: features(trajectory) for name, trajectory in trajectories.items()}
        distances = {name: frechet_estimate(f.pooled, target.statistics) for name, f in seen.items()}
        best = min(distances, key=lambda name: distances[name].value)
        for name, trajectory in trajectories.items():
            tell(rows, options, trajectory, fd=distances[name].as_json())
        for search in options.searches:
            method, objective = search.split("-")
            if method == "grid" and steps > 6:
                continue
            start = time.perf_counter()
            found = search_trajectory(
                fast, steps, method, objective, target=target, options=limits, batch_size=BATCH
            )
            seconds = round(time.perf_counter() - start, 1)
            pooled = features(found).pooled
            difference = frechet_difference(pooled, seen[best].pooled, target.statistics, paired=True)
            tell(
                rows,
                options,
                found,
                fd=frechet_estimate(pooled, target.statistics).as_json(),
                against=best,
                difference=difference.as_json(),
                seconds=seconds,
            )


def tell(
    rows: list[dict[str, object]], options: argparse.Namespace, trajectory: Trajectory, **figures: object
) -> None:
    row = {**trajectory.to_dict(), **figures}
    rows.append(row)
    names = ("method", "objective", "timesteps", "network_evaluations", *figures)
    print({name: row[name] for name in names}, flush=True)
    peers.save(options.name, {**vars(options), "rows": rows})


if __name__ == "__main__":
    main()

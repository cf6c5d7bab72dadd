"""Are optimal variances (Analytic-DPM) better than DDPM's two default ones, in few steps?

    python benchmarks/analytic_variance.py --threads 1

The bundled model by OpenVINO (f32), evenly spaced timesteps ("leading", diffusers' default), DDPM with fixed_large
(beta of the timesteps visited), fixed_small (betatilde of them), and the optimal variance of Gamma, which is estimated
on the model's own images, of other seeds; beside them analytic DDIM and, on request, the timesteps that leave the
least divergence, and DDIM itself. FD of the digits' features to the training digits with its jackknife interval, and
paired differences from the two defaults: image k of all rows is made of the noise of seed k. At the end Gamma of the
int8 network (`--int8`) against the full-precision one's, on the same seeds. Killed and started again it goes on: Gamma
and images stay in Octavo's cache.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from diffusers import DDPMScheduler

import octavo
from octavo.diffusion.analytic import Gamma, analytic_trajectory, estimate_gamma, with_analytic_variance
from octavo.diffusion.analytic.variance import image_variances
from octavo.diffusion.samplers import with_scheduler
from octavo.diffusion.trajectories import noise_schedule, with_trajectory
from octavo.evaluation.features import Features, extract
from octavo.evaluation.frechet import frechet_difference, frechet_estimate
from octavo.evaluation.generate import to_uint8
from octavo.evaluation.shards import executed, generate_shards
from octavo.evaluation.target import Target

BATCH = 32
DEFAULTS = ("fixed_large", "fixed_small")
OWN = "analytic ddpm own timesteps"
ROWS = (*DEFAULTS, "analytic ddpm", "analytic ddim", OWN, "ddim")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 25, 50])
    parser.add_argument("--rows", nargs="+", default=list(ROWS[:4]), choices=list(ROWS))
    parser.add_argument("--num-images", type=int, default=512)
    parser.add_argument("--gamma-images", type=int, default=128)
    parser.add_argument("--last-noise", type=float, default=1.0, help="in levels of 8 bits; inf: not clipped")
    parser.add_argument("--int8", type=Path, help="a folder of the same model, quantized")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", default="analytic_variance", help="of the file in results/")
    options = parser.parse_args()
    options.last_noise = None if math.isinf(options.last_noise) else options.last_noise
    torch.set_num_threads(options.threads)
    target = Target.of("digits", None, (16, 16, 1))
    real = target.statistics
    assert real is not None

    ddim = octavo.load("digits")
    ddim.set_progress_bar_config(disable=True)
    ddpm = with_scheduler(ddim, "ddpm")
    fast = accelerated(ddpm, options)
    gamma = gamma_of(fast, options)
    found: dict[str, Any] = {"gamma": gamma.to_dict(), "rows": []}

    def pipeline(row: str, steps: int) -> Any:
        if row.startswith("analytic"):
            settings = {"last_noise": options.last_noise, "networks": executed(fast)[1]}
            analytic = with_analytic_variance(fast, gamma, row.split()[1], **settings)
            if row == OWN:
                return with_trajectory(analytic, analytic_trajectory(analytic.scheduler, gamma, steps))
            return analytic
        if row == "ddim":
            return accelerated(ddim, options)
        own = copy.copy(ddpm)
        own.register_modules(scheduler=DDPMScheduler.from_config(ddpm.scheduler.config, variance_type=row))
        return accelerated(own, options)

    def features(row: str, steps: int) -> Features:
        store = generate_shards(
            pipeline(row, steps), options.num_images, steps=steps, batch_size=BATCH, label=f"{steps} {row}"
        )
        return extract(target.extractor, to_uint8(store.images()))

    for steps in options.steps:
        seen: dict[str, torch.Tensor] = {}
        for row in options.rows:
            seen[row] = features(row, steps).pooled
            estimate = frechet_estimate(seen[row], real)
            figures: dict[str, Any] = {"steps": steps, "variance": row, "fd": estimate.as_json()}
            line = f"{steps:3d} steps  {row:27s} FD {estimate}"
            for default in DEFAULTS:
                if row not in DEFAULTS and default in seen:
                    less = frechet_difference(seen[row], seen[default], real, paired=True)
                    figures[f"difference from {default}"] = less.as_json()
                    line += f"   from {default} {less}"
            found["rows"].append(figures)
            print(line, flush=True)
            peers.save(options.name, {**named(options), **found})
    if options.int8 is not None:
        int8 = with_scheduler(octavo.load(str(options.int8)), "ddpm")
        int8.set_progress_bar_config(disable=True)
        other = gamma_of(accelerated(int8, options), options)
        found["gamma_int8"] = other.to_dict()
        print_gammas(gamma, other, noise_schedule(ddpm.scheduler).alpha_bars)
        peers.save(options.name, {**named(options), **found})


def accelerated(pipeline: Any, options: argparse.Namespace) -> Any:
    return octavo.accelerate(pipeline, precision="f32", threads=options.threads, batch_size=BATCH)


def gamma_of(pipeline: Any, options: argparse.Namespace) -> Gamma:
    runtime, networks = executed(pipeline)
    return estimate_gamma(
        pipeline, images=options.gamma_images, batch_size=BATCH, networks=networks, runtime=runtime
    )


def print_gammas(float32: Gamma, int8: Gamma, alpha_bars: np.ndarray[Any, Any]) -> None:
    """Gamma of both, and the variance of x_0 given x_t that it stands for."""
    print("  t    Gamma fp32          Gamma int8          difference   variance of x_0: fp32, int8")
    for i, t in enumerate(float32.timesteps):
        if i % 9:
            continue
        two = [
            (g.values[i], g.errors[i], float(image_variances(alpha_bars[[t]], np.array([g.values[i]]))[0]))
            for g in (float32, int8)
        ]
        (a, error_a, variance_a), (b, error_b, variance_b) = two
        print(
            f"{t:4d}  {a:.5f} +- {error_a:.5f}  {b:.5f} +- {error_b:.5f}  {b - a:+.5f}     "
            f"{variance_a:.5f}  {variance_b:.5f}"
        )


def named(options: argparse.Namespace) -> dict[str, Any]:
    return {**vars(options), "int8": options.int8 and options.int8.name}


if __name__ == "__main__":
    main()

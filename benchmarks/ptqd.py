"""Does PTQD's correction of the output (2305.10657, section 4.2) pay on top of bias correction?

    python benchmarks/ptqd.py --recipes ptq4dm best --widths W4A8 W7A8 W7A6 --seeds 0 1 --name all
    python benchmarks/ptqd.py --variance --name variance

Bundled model, DDIM-20, 64 calibration pairs, real int8 (weights of at most 7 bits), one thread. For each timestep the
error d = eps_q - eps of the quantized network is fitted on the trajectories of 32 images:

    k     = sum_c Cov(d, eps) / sum_c Var(eps)      its part correlated with the output
    mean  = E[d - k eps]                            of each output channel, or of each output pixel

and (eps_q - mean) / (1 + k) is handed to the sampler for 32 other images. "k" has no mean, "mean" has no k. A timestep
is left as it is where a correction fitted on one half of the fit images raises the error of the other half. "as
built": what `output_correction=True` makes of the 64 calibration pairs alone, timesteps pooled. Figures: PSNR to full
precision, same seeds, as paired differences with their 95 % interval over images.

`--variance`: what share of DDPM-50's own variance the residual's variance is (2305.10657, section 4.3).
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from torch import nn

import octavo
from octavo.calibration import collect_pairs, observe, quantize_observed, trace
from octavo.calibration.bias import correct_biases
from octavo.calibration.collect import PairStore
from octavo.calibration.output_correction import fit_output_correction
from octavo.diffusion.samplers import with_scheduler
from octavo.evaluation.generate import generate
from octavo.evaluation.intervals import mean_estimate
from octavo.evaluation.similarity import psnr
from octavo.evaluation.trajectory import TrajectoryStep, trajectory

WIDTHS = {
    "W4A8": {"weights": 4},
    "W7A8": {"weights": 7},
    "W7A6": {"weights": 7, "activations": 6},
}
FIT_SEED, TEST_SEED = 70_000, 80_000
Correction = tuple[float, torch.Tensor]  # k, and the mean in a shape that fits the output
AS_BUILT = "as built"
KINDS = ("k", "mean", "k and mean", "k and mean of pixels", AS_BUILT)


def fitted(kind: str, eps: torch.Tensor, error: torch.Tensor) -> Correction:
    """k and the mean of one timestep; `eps`, `error` [images, C, H, W] float64."""
    dims: tuple[int, ...] = (0,) if kind.endswith("pixels") else (0, 2, 3)
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    if kind == "k":
        return float((error * eps).sum() / eps.square().sum()), zero
    centred = eps - eps.mean(dims, keepdim=True)
    k = 0.0 if kind == "mean" else float((error * centred).sum() / centred.square().sum())
    return k, (error - k * eps).mean(dims, keepdim=True)


def left_over(correction: Correction, eps: torch.Tensor, error: torch.Tensor) -> float:
    k, mean = correction
    return float(((error - mean - k * eps) / (1 + k)).square().mean())


def helps(kind: str, eps: torch.Tensor, error: torch.Tensor) -> bool:
    """Whether it lowers the error of the images that it was not fitted on: each half judged by the other."""
    halves = (slice(0, None, 2), slice(1, None, 2))
    after = sum(
        left_over(fitted(kind, eps[mine], error[mine]), eps[other], error[other])
        for mine, other in (halves, halves[::-1])
    )
    return after < sum(float(error[half].square().mean()) for half in halves)


def outputs(denoiser: nn.Module, steps: list[TrajectoryStep]) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [denoiser(**step.calls[0], return_dict=False)[0].double() for step in steps]


@contextmanager
def corrected(denoiser: nn.Module, table: dict[float, Correction]) -> Iterator[None]:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        timestep = float(torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"]).flatten()[0])
        if timestep in table:
            k, mean = table[timestep]
            output.sample = ((output.sample - mean) / (1 + k)).float()
        return output

    handle = denoiser.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def difference(values: np.ndarray, base: np.ndarray) -> dict[str, float]:
    estimate = mean_estimate(values - base)
    return {"gain": round(estimate.value, 2), "interval_95": round((estimate.high - estimate.low) / 2, 2)}


def quantized_pipelines(
    original: Any, options: argparse.Namespace
) -> Iterator[tuple[dict[str, Any], Any, PairStore]]:
    """Every network that is compared, as (what it is, pipeline, its pairs), without and with bias correction."""
    traced = trace(original)
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            base = octavo.PTQ4DM(samples=64, steps=20)
            pairs = collect_pairs(original, base, Path(folder), seed=seed, progress=False)
            seen = observe(original.unet, pairs, progress=False)
            for width in options.widths:
                for name in options.recipes:
                    recipe = octavo.named_recipe(name, samples=64, steps=20, **WIDTHS[width])
                    plain = quantize_observed(original, recipe, seen, traced, pairs=pairs, seed=seed)
                    row = {"seed": seed, "width": width, "recipe": name}
                    if not options.on_top:
                        yield {**row, "bias_correction": False}, plain, pairs
                    unet = copy.deepcopy(plain.unet)
                    correct_biases(unet, original.unet, pairs, traced.executed, progress=False)
                    shifted = copy.copy(plain)
                    shifted.unet = unet
                    yield {**row, "bias_correction": True}, shifted, pairs


def built(quantized: nn.Module, original: nn.Module, pairs: PairStore, steps: Any) -> dict[float, Correction]:
    correction, _ = fit_output_correction(quantized, original, pairs, progress=False)
    if correction is None:
        return {}
    values = {step.timestep: correction.at(torch.tensor(step.timestep)) for step in steps}
    return {timestep: (float(k), mean.double()) for timestep, (k, mean) in values.items()}


def measure_gains(original: Any, options: argparse.Namespace) -> None:
    def images(pipeline: Any) -> np.ndarray:
        return generate(pipeline, options.num_images, steps=20, seed=TEST_SEED, batch_size=32, progress=False)

    steps = trajectory(original, num_images=32, steps=20, seed=FIT_SEED)
    eps, reference = outputs(original.unet, steps), images(original)
    rows: list[dict[str, Any]] = []
    plain: np.ndarray | None = None
    for row, pipeline, pairs in quantized_pipelines(original, options):
        fast = octavo.accelerate(pipeline, precision="f32", threads=1, batch_size=32)
        errors = [q - e for q, e in zip(outputs(fast.unet, steps), eps, strict=True)]
        base = psnr(images(fast), reference)
        row["psnr"] = round(float(base.mean()), 2)
        if not row["bias_correction"]:
            plain = base
        elif plain is not None:
            row["over no bias correction"] = difference(base, plain)
        for kind in options.kinds:
            if kind == AS_BUILT:
                table = built(pipeline.unet, original.unet, pairs, steps)
            else:
                table = {
                    step.timestep: fitted(kind, e, d)
                    for step, e, d in zip(steps, eps, errors, strict=True)
                    if helps(kind, e, d)
                }
            with corrected(fast.unet, table):
                row[kind] = {**difference(psnr(images(fast), reference), base), "timesteps": len(table)}
        rows.append(row)
        print(row, flush=True)
        peers.save(f"ptqd_{options.name}", {"num_images": options.num_images, "rows": rows})


def measure_variance(original: Any, options: argparse.Namespace) -> None:
    """share = beta^2 / (alpha (1 - abar)) Var(residual) / sigma^2, sigma^2 = beta (1 - abar_prev) / (1 - abar)."""
    ddpm = with_scheduler(original, "ddpm")
    steps = trajectory(ddpm, num_images=16, steps=50, seed=FIT_SEED)
    eps = outputs(original.unet, steps)
    cumulative = ddpm.scheduler.alphas_cumprod.double()
    rows = []
    for row, pipeline, _ in quantized_pipelines(original, options):
        fast = octavo.accelerate(pipeline, precision="f32", threads=1, batch_size=16)
        shares = {}
        for i, (step, q) in enumerate(zip(steps[:-1], outputs(fast.unet, steps[:-1]), strict=True)):
            error = q - eps[i]
            residual = left_over(fitted("k and mean", eps[i], error), eps[i], error)
            now, before = cumulative[int(step.timestep)], cumulative[int(steps[i + 1].timestep)]
            alpha = now / before
            of_mean = (1 - alpha) ** 2 / (alpha * (1 - now)) * residual
            shares[int(step.timestep)] = float(of_mean / ((1 - alpha) * (1 - before) / (1 - now)))
        values = np.array(list(shares.values()))
        row.update(
            largest=float(values.max()),
            at=max(shares, key=lambda t: shares[t]),
            median=float(np.median(values)),
        )
        rows.append(row)
        print(row, flush=True)
    peers.save(f"ptqd_{options.name}", {"rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", default=["ptq4dm", "best"])
    parser.add_argument("--widths", nargs="+", default=list(WIDTHS), choices=list(WIDTHS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--num-images", type=int, default=32)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--on-top", action="store_true", help="only with bias correction")
    parser.add_argument("--variance", action="store_true")
    parser.add_argument("--name", required=True, help="of the file in benchmarks/results: ptqd_NAME.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    original = octavo.load("digits")
    original.set_progress_bar_config(disable=True)
    measure: Callable[[Any, argparse.Namespace], None] = (
        measure_variance if options.variance else measure_gains
    )
    measure(original, options)


if __name__ == "__main__":
    main()

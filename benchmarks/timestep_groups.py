"""Do activation scales by timestep pay: at which bits, in how many groups, and what do they cost?

    python benchmarks/timestep_groups.py
    python benchmarks/timestep_groups.py --speed MODEL

GPTQ rounding with and without balanced channels, 1 to 8 groups of timesteps, on the same calibration pairs, the same
images in real int8 (f32 remainder). PSNR: to fp32, same seeds, the mean with its 95 % interval over images; "gain": the
paired difference from one group. "error": of the network's output, in one evaluation on what other images' trajectories
hand it, E ||y_q - y||^2 / E ||y||^2 in dB; it tells smaller differences than the end of a trajectory does.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from weight_bits import BATCH, interval

import octavo
from octavo.calibration import (
    attach_timestep_groups,
    collect_pairs,
    layer_rules,
    observe,
    quantize_denoiser,
    trace,
    with_denoiser,
)
from octavo.calibration.balance import multipliers
from octavo.calibration.evaluate import rows_at_once
from octavo.calibration.observations import Observations
from octavo.calibration.operations import TIMESTEP_GROUPS
from octavo.calibration.second_order import round_again
from octavo.calibration.timestep_scales import TimestepScales, timestep_scales
from octavo.diffusion import collate, first_call
from octavo.evaluation.generate import generate
from octavo.evaluation.similarity import psnr
from octavo.evaluation.speed import format_table, table, take_turns
from octavo.quantization import quantized_layers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-images", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the calibration")
    parser.add_argument("--weights", type=int, default=8)
    parser.add_argument("--activations", type=int, nargs="+", default=[8, 6])
    parser.add_argument("--balance", type=int, nargs="+", default=[0, 1], choices=[0, 1])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="images at once, for --speed")
    parser.add_argument("--rounds", type=int, default=40, help="for --speed")
    parser.add_argument(
        "--nearest", action="store_true", help="rounded to nearest: where activations are what matters"
    )
    parser.add_argument("--workdir", type=Path, help="keeps the calibration pairs for the next run")
    parser.add_argument("--name", default="timestep_groups", help="of the file in results/, added to")
    parser.add_argument("--speed", type=Path, metavar="MODEL", help="a saved model with scales by timestep")
    options = parser.parse_args()
    if options.speed:
        return speed(options)
    original = octavo.load("digits")
    original.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as temporary:
        fidelity(options, original, options.workdir or Path(temporary))


def quantized(options: argparse.Namespace, original: Any, workdir: Path, seed: int) -> Any:
    """A function from activation bits, balancing and groups to the quantized pipeline, on pairs of this seed.

    As `octavo.quantize` makes it with GPTQ rounding, but channels are balanced once for all numbers of groups.
    """
    sizes = {"samples": options.samples, "steps": options.steps}
    folder = workdir / f"{seed}-{options.samples}-{options.steps}"
    folder.mkdir(parents=True, exist_ok=True)
    plain = octavo.named_recipe("ptq4dm", **sizes)
    network = original.unet
    pairs = collect_pairs(original, plain, folder, seed=seed, batch_size=BATCH, progress=False)
    seen = observe(network, pairs, state_folder=folder, progress=False)
    traced = trace(original)

    @cache
    def balanced(activations: int) -> tuple[dict[str, torch.Tensor], Observations]:
        recipe = octavo.named_recipe("best", **sizes, weights=options.weights, activations=activations)
        rules = layer_rules(recipe, traced.executed, traced.edges)
        state = folder / f"multipliers-w{options.weights}a{activations}.safetensors"
        factors = multipliers(network, pairs, rules, rounding="gptq", seed=seed, state=state, progress=False)
        behind = observe(network, pairs, multipliers=factors, progress=False)
        return factors, Observations({**seen.layers, **behind.layers}, seen.operations)

    def make(activations: int, balance: bool, groups: int) -> Any:
        recipe = octavo.named_recipe(
            "best", **sizes, weights=options.weights, activations=activations, timestep_groups=groups
        )
        rules = layer_rules(recipe, traced.executed, traced.edges)
        factors, observed = balanced(activations) if balance else ({}, seen)
        scales = TimestepScales()
        if groups > 1:
            scales = timestep_scales(network, pairs, rules, groups, multipliers=factors, progress=False)
        denoiser = quantize_denoiser(
            network, recipe, rules, {}, observed, multipliers=factors, by_timestep=scales
        )
        if not options.nearest:
            round_again(denoiser, network, pairs, seed=seed, progress=False)
        return with_denoiser(original, "unet", denoiser)

    return make


def by_timestep(pipeline: Any) -> int:
    return sum(layer.timestep_factor is not None for _, layer in quantized_layers(pipeline.unet))


def fidelity(options: argparse.Namespace, original: Any, workdir: Path) -> None:
    def sample(pipeline: Any) -> np.ndarray:
        fast = octavo.accelerate(pipeline, precision="f32", batch_size=BATCH, threads=torch.get_num_threads())
        assert pipeline is original or all(row.ok for row in octavo.audit(fast))
        return generate(
            fast, options.num_images, steps=options.steps, seed=70_000, batch_size=BATCH, progress=False
        )

    def output_error(pipeline: Any, held_out: Any) -> float:
        fast = octavo.accelerate(pipeline, precision="f32", batch_size=BATCH, threads=torch.get_num_threads())
        squares = energy = 0.0
        for rows in (rows for batch in held_out for rows in rows_at_once(batch)):
            call = {**collate(rows), "return_dict": False}
            with torch.inference_mode():
                y, y_q = (unet(**call)[0].double() for unet in (original.unet, fast.unet))
            squares, energy = squares + float((y_q - y).square().sum()), energy + float(y.square().sum())
        return round(10 * math.log10(squares / energy), 2)

    reference = sample(original)
    sizes = {"samples": 4 * BATCH, "steps": options.steps // 5, "timesteps": "uniform"}
    folder = workdir / "held-out"
    folder.mkdir(parents=True, exist_ok=True)
    plain = octavo.named_recipe("ptq4dm", **sizes)
    held_out = collect_pairs(original, plain, folder, seed=999, batch_size=BATCH, progress=False)
    for seed in options.seeds:
        make = quantized(options, original, workdir, seed)
        for activations in options.activations:
            for balance in options.balance:
                decibels: dict[int, np.ndarray] = {}
                for groups in options.groups:
                    pipeline = make(activations, bool(balance), groups)
                    decibels[groups] = np.minimum(psnr(sample(pipeline), reference), 100.0)
                    row: dict[str, Any] = {
                        "bits": f"W{options.weights}A{activations}",
                        "rounding": "nearest" if options.nearest else "gptq",
                        "balance": bool(balance),
                        "groups": groups,
                        "seed": seed,
                        "layers": by_timestep(pipeline),
                        "error": output_error(pipeline, held_out),
                        "psnr": interval(decibels[groups]),
                    }
                    if groups != options.groups[0]:
                        row["gain"] = interval(decibels[groups] - decibels[options.groups[0]])
                    add(options.name, "rows", row, ("bits", "rounding", "balance", "groups", "seed"))


def speed(options: argparse.Namespace) -> None:
    """One evaluation of a saved model as it is, with one scale in each layer, and with a table in every layer."""
    models = {name: octavo.load(options.speed) for name in ("one scale", "as saved", "all layers")}
    one, saved, every = (pipeline.unet for pipeline in models.values())
    factors = {name: layer.timestep_factor for name, layer in quantized_layers(saved)}
    some = next(factor for factor in factors.values() if factor is not None)
    for _, layer in quantized_layers(one):
        layer.timestep_factor = None
    del one.octavo_operations[TIMESTEP_GROUPS]
    groups = every.octavo_operations[TIMESTEP_GROUPS]
    attach_timestep_groups(every, groups, {name: some.clone() for name in factors})
    for batch in options.batches:
        args, kwargs = first_call(models["as saved"], batch_size=batch)
        engines = {}
        for name, model in models.items():
            fast = octavo.accelerate(
                model, precision="f32", batch_size=batch, threads=torch.get_num_threads()
            )
            assert all(row.ok for row in octavo.audit(fast))
            engines[name] = partial(fast.unet, *args, **kwargs)
        with torch.inference_mode():
            timings = take_turns(engines, rounds=options.rounds, warm_up=5)
        rows = table(timings, "one scale", per=batch)
        print(f"batch {batch}\n" + format_table(rows, "images", "one scale"))
        for row in rows:
            timing = {"batch": batch, "layers": by_timestep(models[str(row["engine"])]), **row}
            add(options.name, "speed", timing, ("batch", "engine"))


def add(name: str, kind: str, row: dict[str, Any], key: tuple[str, ...]) -> None:
    """Into results/NAME.json, in place of an earlier row of the same key."""
    path = peers.RESULTS / f"{name}.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    rows = [old for old in known.get(kind, []) if any(old.get(field) != row[field] for field in key)]
    print(row, flush=True)
    peers.save(name, {**known, kind: [*rows, row]})


if __name__ == "__main__":
    main()

"""What the time embedding in float or from a table, and absorbed multipliers, do for fidelity and speed.

    python benchmarks/time_embedding.py fidelity      # minutes a seed
    python benchmarks/time_embedding.py speed         # nothing else may run

"quantized": every layer in int8, as the recipe was; "float": the layers that read the timestep alone stay float, and
are computed; "table": the same network, their outputs read from a table in the graph; "absorbed": quantized, with
balancing's multipliers made by the module in front where one can; "both": absorbed and table. All on the same
calibration pairs, executed in real int8 (f32 remainder). PSNR: to fp32, same seeds, the mean with its 95 % interval
over images; "gain": the paired difference from "quantized". Speed: one evaluation, in turn in one process.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from weight_bits import BATCH, interval

import octavo
from octavo.calibration import collect_pairs, observe, quantize_observed, trace
from octavo.checkpoint import tensor_bytes
from octavo.diffusion import first_call, with_denoiser
from octavo.evaluation.generate import Images, generate
from octavo.evaluation.peers.architectures import architecture
from octavo.evaluation.similarity import psnr
from octavo.evaluation.speed import format_table, table, take_turns
from octavo.quantization import quantized_layers
from octavo.runtimes.accelerate import executed_by
from octavo.runtimes.audit import require_integers
from octavo.runtimes.openvino import OpenVINOExecutor

QUANTIZED, EMBEDDED = {}, {"time_embedding": "float"}
ABSORBED = {"absorb": True}
VARIANTS: dict[str, tuple[dict[str, Any], int]] = {
    "quantized": (QUANTIZED, 1000),
    "float": (EMBEDDED, 0),
    "table": (EMBEDDED, 1000),
    "absorbed": (ABSORBED, 1000),
    "both": ({**EMBEDDED, **ABSORBED}, 1000),
}
"""Changes of the recipe, and how many timesteps the runtime tabulates."""


def executor(unet: Any, timesteps: int, threads: int | None) -> OpenVINOExecutor:
    return OpenVINOExecutor(unet, precision="f32", threads=threads, timesteps=timesteps)


def executed(pipeline: Any, timesteps: int, threads: int | None) -> Any:
    made = executor(pipeline.unet, timesteps, threads)
    args, kwargs = first_call(pipeline, batch_size=BATCH)
    require_integers(made.prepare(*args, **kwargs).audit)
    return with_denoiser(pipeline, "unet", executed_by(made, pipeline.unet))


def fidelity(options: argparse.Namespace, original: Any) -> None:
    traced = trace(original)

    def sample(pipeline: Any, timesteps: int = 1000) -> Images:
        fast = executed(pipeline, timesteps, torch.get_num_threads())
        return generate(
            fast, options.num_images, steps=options.steps, seed=70_000, batch_size=BATCH, progress=False
        )

    reference = sample(original, 0)
    rows = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            plain = octavo.named_recipe("ptq4dm", samples=options.samples, steps=options.steps)
            pairs = collect_pairs(original, plain, Path(folder), seed=seed, batch_size=BATCH, progress=False)
            seen = observe(original.unet, pairs, progress=False)
            for bits in options.bits:
                base = octavo.named_recipe(
                    options.recipe, samples=options.samples, steps=options.steps, weights=bits
                )
                base = dataclasses.replace(base, time_embedding="quantized", absorb=False)
                made: dict[str, Any] = {}
                decibels: dict[str, np.ndarray] = {}
                for name in options.variants:
                    changes, timesteps = VARIANTS[name]
                    recipe = dataclasses.replace(base, **changes)
                    key = repr(changes)
                    if key not in made:
                        made[key] = quantize_observed(original, recipe, seen, traced, pairs=pairs, seed=seed)
                    quantized = made[key]
                    decibels[name] = np.minimum(psnr(sample(quantized, timesteps), reference), 100.0)
                    multiplied = sum(
                        layer.input_multiplier is not None for _, layer in quantized_layers(quantized.unet)
                    )
                    row = {
                        "bits": bits,
                        "seed": seed,
                        "variant": name,
                        "psnr": interval(decibels[name]),
                        "layers": sum(1 for _ in quantized_layers(quantized.unet)),
                        "multiplying": multiplied,
                        "megabytes": round(tensor_bytes(quantized.unet) / 1e6, 3),
                    }
                    if name != options.variants[0]:
                        row["gain"] = interval(decibels[name] - decibels[options.variants[0]])
                    rows.append(row)
                    print(row, flush=True)
                    peers.save(options.name, {**vars(options), "rows": rows})


def speed(options: argparse.Namespace, original: Any) -> None:
    """Fidelity plays no part, so that few pairs, no range search and nearest rounding do."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        base = octavo.PTQ4DM(samples=16, steps=8, balance=True, metric="minmax")
        pairs = collect_pairs(original, base, Path(folder), batch_size=4, progress=False)
        seen, traced = observe(original.unet, pairs, progress=False), trace(original)
        for bits in options.bits:
            made = {
                repr(changes): quantize_observed(
                    original, dataclasses.replace(base, weights=bits, **changes), seen, traced, pairs=pairs
                )
                for changes, _ in VARIANTS.values()
            }
            for batch_size in options.batch_sizes:
                _, kwargs = first_call(original, batch_size=batch_size)
                engines = {}
                for name in options.variants:
                    changes, timesteps = VARIANTS[name]
                    engine = executor(made[repr(changes)].unet, timesteps, options.threads)
                    require_integers(engine.prepare(**kwargs).audit)
                    engines[name] = functools.partial(engine, **kwargs)
                timings = take_turns(engines, rounds=options.rounds * (8 if batch_size == 1 else 1))
                rows = table(timings, options.variants[0], per=batch_size)
                found[f"{options.model}, {bits} bits, batch {batch_size}"] = rows
                print(
                    f"\n{bits} bits, batch {batch_size}\n{format_table(rows, 'images', 'quantized')}",
                    flush=True,
                )
    peers.save(options.name, {**vars(options), "rows": found})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["fidelity", "speed"])
    parser.add_argument("--model", default="digits", choices=["digits", "cifar"], help="cifar: speed only")
    parser.add_argument("--num-images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the calibration")
    parser.add_argument("--recipe", default="best")
    parser.add_argument("--bits", type=int, nargs="+", default=[8])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--name", help="of the file in results/ (default: time_embedding_WHAT)")
    options = parser.parse_args()
    options.name = options.name or f"time_embedding_{options.what}"
    original = octavo.load("digits") if options.model == "digits" else architecture("ddpm-cifar10")
    original.set_progress_bar_config(disable=True)
    (fidelity if options.what == "fidelity" else speed)(options, original)


if __name__ == "__main__":
    main()

"""The bundled model end to end: same-seed PSNR to fp32, and images a second, ours beside NNCF's and OpenVINO bf16.

    python benchmarks/bench_digits.py           # DDIM-50, 256 images; needs the `bench` extra (NNCF)

All calibrate on the same pairs. PSNR: final images against torch fp32 of the same seeds. Speed: whole batches of
images, each engine once a round.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import peers

import octavo
from octavo.calibration import collect_pairs, with_denoiser
from octavo.diffusion import call_pipeline, collate, generators
from octavo.evaluation.generate import generate
from octavo.evaluation.intervals import mean_estimate
from octavo.evaluation.similarity import psnr
from octavo.evaluation.speed import format_table, table, take_turns
from octavo.runtimes import audit

BASELINE = "torch eager fp32"


def pipelines(batch_size: int, samples: int, steps: int) -> dict[str, object]:
    original = octavo.load("digits")
    recipe = octavo.PTQ4DM(samples=samples, steps=steps)
    built: dict[str, object] = {BASELINE: original}
    best = {"rounding": "gptq", "balance": True}
    for name, changes in {"": {}, " best": best, " best w4a8": {**best, "weights": 4}}.items():
        quantized = octavo.quantize(original, dataclasses.replace(recipe, **changes), batch_size=32)
        for precision in ("f32", "bf16"):
            built[f"octavo int8{name}, {precision}"] = octavo.accelerate(
                quantized, precision=precision, batch_size=batch_size
            )
    for precision in ("f32", "bf16"):
        built[f"openvino {precision}"] = octavo.accelerate(
            original, precision=precision, batch_size=batch_size
        )

    unet = original.unet
    with tempfile.TemporaryDirectory() as folder:
        store = collect_pairs(original, recipe, Path(folder), batch_size=32)  # the same seeds, the same pairs
        pairs = [pair for batch in store for pair in batch]
    calls = [((), collate(pairs[i : i + batch_size])) for i in range(0, len(pairs), batch_size)]
    for name, model in peers.nncf_models(unet, calls).items():
        for precision in ("f32", "bf16"):
            for cut, parts in peers.ways_to_cut(batch_size).items():
                compiled = peers.Compiled(model, precision, unet.forward, parts)
                built[f"{name}, {precision}{cut}"] = _with_forward(original, compiled)
    return built


def _with_forward(pipeline: object, compiled: peers.Compiled) -> object:
    unet = copy.copy(pipeline.unet)
    unet.__dict__["forward"] = compiled
    return with_denoiser(pipeline, "unet", unet)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--samples", type=int, default=256, help="a multiple of --batch-size")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=10_000, help="of the images")
    options = parser.parse_args()

    built = pipelines(options.batch_size, options.samples, options.steps)
    images = {}
    for name, pipeline in built.items():
        pipeline.set_progress_bar_config(disable=True)
        images[name] = generate(
            pipeline,
            options.num_images,
            steps=options.steps,
            seed=options.seed,
            batch_size=options.batch_size,
            label=name,
        )
    fidelity = {}
    print(f"\nPSNR to {BASELINE}, DDIM-{options.steps}, {options.num_images} images, same seeds, dB")
    for name in built:
        if name == BASELINE:
            continue
        values = psnr(images[name], images[BASELINE])
        estimate = mean_estimate(np.minimum(values, 100.0))
        mean, interval = estimate.value, (estimate.high - estimate.low) / 2
        pooled = float(-10 * np.log10(np.mean(10 ** (-values / 10))))
        fidelity[name] = {
            "psnr_mean": round(mean, 2),
            "interval_95": round(interval, 2),
            "psnr_of_pooled_error": round(pooled, 2),
            "psnr_worst": round(float(values.min()), 2),
        }
        print(f"{name:<32} {mean:6.2f} +- {interval:.2f}   pooled {pooled:6.2f}   worst {values.min():6.2f}")

    def sampler(pipeline: object) -> peers.Engine:
        return lambda: call_pipeline(
            pipeline, generators=generators(0, 0, options.batch_size), num_inference_steps=options.steps
        )

    timed = {name: sampler(pipeline) for name, pipeline in built.items()}
    timings = take_turns(timed, rounds=options.rounds, warm_up=1)
    rows = table(timings, BASELINE, per=options.batch_size)
    print(
        f"\nend to end, batch {options.batch_size}, DDIM-{options.steps}\n{format_table(rows, 'image', BASELINE)}"
    )
    audited = audit(built["octavo int8, f32"])
    peers.save(
        "digits",
        {
            **vars(options),
            "fidelity": fidelity,
            "speed": rows,
            "layers_in_int8": f"{sum(row.ok for row in audited)} of {len(audited)}",
        },
    )


if __name__ == "__main__":
    main()

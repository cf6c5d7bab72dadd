"""A pipeline end to end: same-seed PSNR and FD to fp32, and images a second, our recipes beside NNCF and OpenVINO bf16.

    python benchmarks/bench_pipeline.py                          # the bundled model; needs the `bench` extra (NNCF)
    python benchmarks/bench_pipeline.py training/colours --num-images 512 --rounds 0      # fidelity alone
    python benchmarks/bench_pipeline.py --recipes best --rounds 0 --calibration-seeds 0 1 2

All calibrate on the same pairs. PSNR and FD: final images against torch fp32 of the same seeds, where one engine's cut
of a batch does not matter and is not repeated. Speed: whole batches of images, each engine once a round.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import peers

import octavo
from octavo.calibration import collect_pairs, observe, quantize_observed, trace
from octavo.diffusion import call_pipeline, collate, generators, with_denoiser
from octavo.evaluation.compare import compare
from octavo.evaluation.features import load_features
from octavo.evaluation.generate import generate, to_uint8
from octavo.evaluation.real_data import real_data
from octavo.evaluation.speed import format_table, table, take_turns
from octavo.runtimes import audit

BASELINE = "torch eager fp32"
PRECISIONS = (*peers.precisions(), "auto")


def pipelines(
    options: argparse.Namespace,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, float]]:
    """Every engine as a pipeline: those of speed and fidelity, those that differ from them by their streams alone (no
    fidelity) or by the seed of the calibration (no speed); the seconds that quantizing took once the pairs were there.
    """
    original = octavo.load(options.model)
    batch_size = options.batch_size
    built: dict[str, Any] = {BASELINE: original}
    cut: dict[str, Any] = {}
    others: dict[str, Any] = {}
    seconds = {}
    traced = trace(original)
    for seed in reversed(options.calibration_seeds):  # peers have the first one's pairs
        with tempfile.TemporaryDirectory() as folder:
            plain = octavo.named_recipe("ptq4dm", samples=options.samples, steps=options.steps)
            store = collect_pairs(original, plain, Path(folder), batch_size=32, seed=seed)
            seen = observe(original.unet, store)
            for name in options.recipes:
                recipe = octavo.named_recipe(name, samples=options.samples, steps=options.steps)
                start = time.perf_counter()
                quantized = quantize_observed(original, recipe, seen, traced, pairs=store, seed=seed)
                seconds[name] = round(time.perf_counter() - start, 1)
                for precision in PRECISIONS:
                    engine = octavo.accelerate(quantized, precision=precision, batch_size=batch_size)
                    if seed == options.calibration_seeds[0]:
                        built[f"octavo {name}, {precision}"] = engine
                    else:
                        others[f"octavo {name}, {precision}, calibration seed {seed}"] = engine
            pairs = [pair for batch in store for pair in batch]
    calls = [((), collate(pairs[i : i + batch_size])) for i in range(0, len(pairs), batch_size)]
    theirs = {"openvino": peers.openvino_float(original.unet, *calls[0])}
    if not options.no_nncf:
        theirs |= peers.nncf_models(original.unet, calls)
    for name, model in theirs.items():
        for precision in peers.precisions():
            for suffix, parts in peers.ways_to_cut(batch_size).items():
                compiled = peers.Compiled(model, precision, original.unet.forward, parts)
                (cut if suffix else built)[f"{name}, {precision}{suffix}"] = _with_forward(original, compiled)
    return built, cut, others, seconds


def fidelity(built: dict[str, Any], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """PSNR and FD to the baseline's images, and the test of FD to real data, for each engine."""
    extractor = load_features("digits")
    images: dict[str, np.ndarray] = {}
    found: dict[str, dict[str, Any]] = {}
    print(f"\nto {BASELINE}, DDIM-{options.steps}, {options.num_images} images, same seeds", flush=True)
    for name, pipeline in built.items():
        images[name] = generate(
            pipeline,
            options.num_images,
            steps=options.steps,
            seed=options.seed,
            batch_size=options.batch_size,
            progress=False,
        )
        if name == BASELINE:
            real = real_data("digits", options.real_images, images[name].shape[1:])
            continue
        comparison = compare(
            to_uint8(images[name]),
            to_uint8(images[BASELINE]),
            extractor=extractor,
            real=real,
            paired=True,
            floats=images[name],
            reference_floats=images[BASELINE],
        )
        found[name] = {
            field: value
            for field, value in comparison.as_json().items()
            if field in ("psnr", "psnr_pooled", "fd", "p_same", "fd_real_difference", "p_same_real")
        }
        print(
            f"{name:<36} PSNR {comparison.psnr}  FD {comparison.fd}  to real {comparison.fd_real_difference} "
            f"p = {comparison.p_same_real}",
            flush=True,
        )
    return found


def speed(engines: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Whole batches in turn."""

    def sampler(pipeline: Any) -> peers.Engine:
        return lambda: call_pipeline(
            pipeline, generators=generators(0, 0, options.batch_size), num_inference_steps=options.steps
        )

    timings = take_turns(
        {name: sampler(pipeline) for name, pipeline in engines.items()}, rounds=options.rounds, warm_up=1
    )
    rows = table(timings, BASELINE, per=options.batch_size)
    print(
        f"\nend to end, batch {options.batch_size}, DDIM-{options.steps}\n{format_table(rows, 'image', BASELINE)}"
    )
    for ours, theirs in ((f"octavo {name}, f32", "octavo ptq4dm, f32") for name in options.recipes):
        if theirs in timings:
            ratio, low, high = timings[ours].ratio(timings[theirs])
            print(f"{ours} over {theirs}: {ratio:.3f}x ({low:.3f}-{high:.3f})")
    return rows


def _with_forward(pipeline: Any, compiled: peers.Compiled) -> Any:
    unet = copy.copy(pipeline.unet)
    unet.__dict__["forward"] = compiled
    return with_denoiser(pipeline, "unet", unet)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="digits", help="an unconditional pipeline with a `unet`")
    parser.add_argument("--recipes", nargs="+", default=["ptq4dm", "best", "w4a8"])
    parser.add_argument("--num-images", type=int, default=512, help="0: speed alone")
    parser.add_argument("--samples", type=int, default=256, help="a multiple of --batch-size")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="0: fidelity alone")
    parser.add_argument("--seed", type=int, default=10_000, help="of the images")
    parser.add_argument(
        "--calibration-seeds", type=int, nargs="+", default=[0], help="speed: the first alone"
    )
    parser.add_argument("--real-images", type=Path, help="an .npz or a folder; digits have their own")
    parser.add_argument("--no-nncf", action="store_true")
    parser.add_argument("--name", help="of the file in results/ (default: the model's)")
    options = parser.parse_args()

    built, cut, others, seconds = pipelines(options)
    for pipeline in (*built.values(), *cut.values(), *others.values()):
        pipeline.set_progress_bar_config(disable=True)
    rows = speed({**built, **cut}, options) if options.rounds else []
    found = fidelity({**built, **others}, options) if options.num_images else {}
    ours = built[f"octavo {options.recipes[0]}, f32"]
    audited = audit(ours)
    peers.save(
        options.name or Path(options.model).name,
        {
            **{key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
            "fidelity": found,
            "speed": rows,
            "quantizing_seconds_after_observing": seconds,
            "layers_in_int8": f"{sum(row.ok for row in audited)} of {len(audited)}",
        },
    )


if __name__ == "__main__":
    main()

"""`octavo demo`: the whole path on the bundled model, with something to look at."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from octavo.cli.shared import JsonOption, load_quietly, print_figures

BATCH_SIZE = 32


def command(
    out: Annotated[Path, typer.Option(help="The folder to write into.")] = Path("octavo-demo"),
    samples: Annotated[int, typer.Option(min=1, max=1024, help="Calibration pairs.")] = 256,
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps, in calibration and sampling.")] = 50,
    num_images: Annotated[int, typer.Option(min=2, help="Images to sample and compare.")] = 64,
    json: JsonOption = False,
) -> None:
    """Calibrate the bundled digits model, save it, sample images in fp32 and in int8 from the same seeds, report.

    By the recipe best, on a CPU without VNNI with --pair-limit, as one would quantize for it.
    """
    import numpy as np

    from octavo.api import quantize
    from octavo.calibration import named_recipe
    from octavo.checkpoint import float32_bytes, load, save_pipeline, tensor_bytes
    from octavo.checkpoint.save import check_target
    from octavo.diffusion import find_denoiser
    from octavo.evaluation.generate import generate, to_uint8
    from octavo.evaluation.intervals import mean_estimate
    from octavo.evaluation.similarity import psnr
    from octavo.files import write_json
    from octavo.report import gather_report, grid, save_picture, save_report, side_by_side
    from octavo.runtimes import accelerate, audit
    from octavo.runtimes.saturation import adds_in_16_bits

    folder = out / "digits-int8"
    check_target(folder)
    original = load_quietly("digits")
    recipe = named_recipe("best", samples=samples, steps=steps, pair_limit=adds_in_16_bits())
    save_pipeline(quantize(original, recipe, batch_size=BATCH_SIZE), folder)
    loaded = load(folder)
    loaded.set_progress_bar_config(disable=True)
    _, denoiser = find_denoiser(loaded)
    batch_size = min(BATCH_SIZE, num_images)
    fast = accelerate(loaded, batch_size=batch_size)
    rows = audit(fast)

    seconds, images = {}, {}
    for name, pipeline in (("torch fp32", original), ("octavo int8", fast)):
        generate(pipeline, batch_size, steps=2, batch_size=batch_size, progress=False)  # warm up
        start = time.perf_counter()
        images[name] = generate(pipeline, num_images, steps=steps, batch_size=batch_size, label=name)
        seconds[name] = time.perf_counter() - start
    estimate = mean_estimate(np.minimum(psnr(images["octavo int8"], images["torch fp32"]), 100.0))
    decibels, interval = estimate.value, (estimate.high - estimate.low) / 2
    picture = out / "fp32-and-int8.png"
    save_picture(
        side_by_side(
            grid(to_uint8(images["torch fp32"])),
            "full precision (torch fp32)",
            grid(to_uint8(images["octavo int8"])),
            "Octavo int8, same seeds",
        ),
        picture,
    )
    page = out / "report.html"
    data = gather_report(
        loaded,
        original,
        title=folder.name,
        num_images=num_images,
        steps=steps,
        batch_size=batch_size,
        features="auto",
        sampled=(images["octavo int8"], images["torch fp32"]),
    )
    save_report(data, page)
    stored, before = tensor_bytes(denoiser), float32_bytes(denoiser)
    rates = {name: num_images / value for name, value in seconds.items()}
    figures = {
        "denoiser_bytes": stored,
        "denoiser_float32_bytes": before,
        "size_ratio": round(stored / before, 4),
        "images_per_second": {name: round(rate, 2) for name, rate in rates.items()},
        "speedup": round(rates["octavo int8"] / rates["torch fp32"], 3),
        "psnr_db": round(decibels, 2),
        "psnr_db_interval": round(interval, 2),
        "layers_in_int8": f"{sum(row.ok for row in rows)} of {len(rows)}",
        "picture": str(picture),
        "report": str(page),
        "model": str(folder),
        "recipe": "best --pair-limit" if recipe.pair_limit else "best",
    }
    record = out / "figures.json"
    write_json(record, figures)
    text = "\n".join(
        (
            "",
            f"size    {before / 1e6:.1f} MB -> {stored / 1e6:.1f} MB ({stored / before:.3f} of float32)",
            f"speed   {rates['torch fp32']:.1f} -> {rates['octavo int8']:.1f} images/s "
            f"({figures['speedup']:.2f}x, {steps} DDIM steps, sampler included, one run; the report times the network)",
            f"PSNR    {decibels:.1f} dB +- {interval:.1f} (95 %, {num_images} images, int8 against fp32, same seeds)",
            f"audit   {figures['layers_in_int8']} layers with integer activations run in int8",
            f"look    {page}",
            f"        {picture}",
            f"model   {folder} (octavo sample {folder} --out more.png)",
            f"recipe  {figures['recipe']}" + (", since this CPU has no VNNI" if recipe.pair_limit else ""),
            f"figures {record}",
        )
    )
    print_figures(figures, json, text)

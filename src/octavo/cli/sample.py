"""`octavo sample`: images from any pipeline folder, on either runtime."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from octavo.cli.shared import (
    BatchSizeOption,
    ClassLabelsOption,
    JsonOption,
    ModelArgument,
    PrecisionChoice,
    PrecisionOption,
    PromptOption,
    Runtime,
    RuntimeOption,
    SeedOption,
    StepsOrTrajectorysOption,
    ThreadsOption,
    TrajectoryOption,
    inputs_of,
    load_quietly,
    on_trajectory,
    print_figures,
    steps_for,
)


def command(
    model: ModelArgument,
    out: Annotated[
        Path, typer.Option(help=".png: one grid; .npz: arr_0 uint8 NHWC; a folder: numbered PNGs.")
    ],
    num_images: Annotated[int, typer.Option(min=1, help="How many images.")] = 16,
    steps: StepsOrTrajectorysOption = None,
    trajectory: TrajectoryOption = None,
    seed: SeedOption = 0,
    runtime: RuntimeOption = Runtime.openvino,
    batch_size: BatchSizeOption = 16,
    precision: PrecisionOption = PrecisionChoice.auto,
    threads: ThreadsOption = None,
    prompt: PromptOption = None,
    class_labels: ClassLabelsOption = None,
    json: JsonOption = False,
) -> None:
    """Sample images from MODEL, quantized or full-precision. Image k uses seed + k alone."""
    from octavo.evaluation.generate import generate, to_uint8
    from octavo.report import check_images_place, save_images
    from octavo.runtimes import accelerate

    check_images_place(out)
    inputs = inputs_of(prompt, class_labels)
    pipeline = on_trajectory(load_quietly(model), trajectory)
    steps = steps_for(pipeline, steps)
    batch_size = min(batch_size, num_images)
    if runtime is Runtime.openvino:
        pipeline = accelerate(pipeline, precision=precision.value, batch_size=batch_size, inputs=inputs)
    start = time.perf_counter()
    images = generate(pipeline, num_images, steps=steps, seed=seed, batch_size=batch_size, inputs=inputs)
    seconds = time.perf_counter() - start
    written = save_images(to_uint8(images), out)
    figures = {"out": str(out), "num_images": num_images, "steps": steps, "seconds": round(seconds, 3)}
    print_figures(
        figures, json, f"{written}, {num_images / seconds:.2f} images/s ({runtime.value}, {steps} steps)"
    )

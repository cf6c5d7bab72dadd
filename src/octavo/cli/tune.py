"""`octavo tune`: recipe, solver, timesteps and steps chosen together, written as a ready pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from octavo.cli.inputs import Given, takes_inputs
from octavo.cli.shared import (
    BatchSizeOption,
    JsonOption,
    ModelArgument,
    ThreadsOption,
    load_quietly,
    print_figures,
)


@takes_inputs
def command(
    model: ModelArgument,
    target: Annotated[
        str,
        typer.Option(
            help="quality=NUMBER (the largest FD, or with --metric psnr the least dB), quality=reference (the FD of "
            "the full-precision reference), or latency=SECONDS (an image)."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="The folder to write into; what it has of the same arguments is used again.")
    ],
    metric: Annotated[str, typer.Option(help="fd, or psnr to the reference's images.")] = "fd",
    recipes: Annotated[str, typer.Option(help="Recipes to try; float: full precision.")] = "best,float",
    solvers: Annotated[
        str,
        typer.Option(
            help="Solvers to try, as octavo sample --scheduler names them; ddim:0.5: DDIM, eta 0.5."
        ),
    ] = ("ddim,dpmsolver++,unipc"),
    spacings: Annotated[
        str, typer.Option(help="Timesteps to try: dp (searched on each network) and spacings by formula.")
    ] = "dp,trailing,quadratic,karras",
    steps: Annotated[
        str, typer.Option(help="Numbers of steps to try.")
    ] = "3,4,5,6,8,10,12,15,20,25,30,40,50",
    num_images: Annotated[int, typer.Option(min=8, help="Images of each score.")] = 512,
    verify_images: Annotated[
        int, typer.Option(min=8, help="Other images, by which the winner is compared with the reference.")
    ] = 1024,
    reference_steps: Annotated[int, typer.Option(min=1, help="Steps of the reference.")] = 100,
    features: Annotated[
        str | None,
        typer.Option(
            help="digits, inception, or an .xml or .onnx network (default: digits for 16x16 grey, else inception)."
        ),
    ] = None,
    real_images: Annotated[Path | None, typer.Option(help="Real images, for FD (digits: bundled).")] = None,
    samples: Annotated[int, typer.Option(help="Calibration pairs, at most 1024.")] = 256,
    calibration_steps: Annotated[int, typer.Option(help="Sampler steps while calibrating.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Of the calibration and of the images.")] = 0,
    batch_size: BatchSizeOption = 16,
    threads: ThreadsOption = None,
    *,
    given: Given,
    json: JsonOption = False,
) -> None:
    """Choose recipe, solver, timesteps and their number for MODEL, on its quantized networks in int8.

    What it costs at most, in evaluations of the network, is told before it starts. Seconds are the network's alone.
    Killed and started again with the same arguments, it goes on after the last score.
    """
    from octavo.diffusion import sample_shape
    from octavo.evaluation.target import Target
    from octavo.report import save_front
    from octavo.study.tune import tune
    from octavo.study.tune_options import Goal, TuneOptions
    from octavo.study.tune_report import tune_text

    goal = Goal.of(target)
    options = TuneOptions(
        recipes=_names(recipes),
        solvers=_names(solvers),
        spacings=_names(spacings),
        steps=_numbers(steps),
        metric=metric,
        num_images=num_images,
        verify_images=verify_images,
        reference_steps=reference_steps,
    )
    pipeline = load_quietly(model)
    inputs = given.inputs(pipeline)
    wanted = None
    if metric == "fd":
        wanted = Target.of(features, real_images, sample_shape(pipeline, inputs))
    results: dict[str, Any] = tune(
        pipeline,
        goal,
        out,
        target=wanted,
        options=options,
        calibration={"samples": samples, "steps": calibration_steps},
        seed=seed,
        batch_size=batch_size,
        inputs=inputs,
    )
    picture = out / "front.svg"
    save_front(results, picture)
    print_figures(results, json, f"{tune_text(results)}\nfront: {picture}")


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[int, ...]:
    from octavo.errors import OctavoError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise OctavoError(f"--steps: {text!r} is not a list like 5,10,20") from error

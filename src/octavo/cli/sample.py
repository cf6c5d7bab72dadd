"""`octavo sample`: images from any pipeline folder, on any runtime."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from octavo.cli.inputs import Given, takes_inputs
from octavo.cli.shared import (
    BatchSizeOption,
    JsonOption,
    ModelArgument,
    PrecisionChoice,
    PrecisionOption,
    ReuseOption,
    Runtime,
    RuntimeOption,
    SeedOption,
    StepsOrTrajectorysOption,
    ThreadsOption,
    TrajectoryOption,
    check_precision,
    holding,
    load_quietly,
    on_trajectory,
    print_figures,
    reuse_plan,
    steps_for,
)


@takes_inputs
def command(
    context: typer.Context,
    model: ModelArgument,
    out: Annotated[
        Path, typer.Option(help=".png: one grid; .npz: arr_0 uint8 NHWC; a folder: numbered PNGs.")
    ],
    num_images: Annotated[int, typer.Option(min=1, help="How many images.")] = 16,
    steps: StepsOrTrajectorysOption = None,
    trajectory: TrajectoryOption = None,
    reuse: ReuseOption = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="ddim, ddpm, dpmsolver++, dpmsolver++sde, unipc, deis, pndm, heun, euler, euler_ancestral, "
            "predictor_corrector, or a diffusers class (default: the model's own); rk45 (the probability flow) or "
            "adaptive (the SDE), which choose the steps of each image themselves."
        ),
    ] = None,
    rtol: Annotated[
        float | None,
        typer.Option(help="rk45, adaptive: relative tolerance (default: 1e-5 or 0.02); larger is faster."),
    ] = None,
    atol: Annotated[
        float | None, typer.Option(help="rk45, adaptive: absolute tolerance (default: 1e-5 or 0.0078).")
    ] = None,
    seed: SeedOption = 0,
    runtime: RuntimeOption = Runtime.openvino,
    batch_size: BatchSizeOption = 16,
    precision: PrecisionOption = PrecisionChoice.auto,
    threads: ThreadsOption = None,
    *,
    given: Given,
    json: JsonOption = False,
) -> None:
    """Sample images from MODEL, quantized or full-precision. Image k uses seed + k alone."""
    from octavo.diffusion.run import check_number_of_steps
    from octavo.diffusion.samplers import ADAPTIVE, solver_name, with_scheduler
    from octavo.evaluation.generate import check_makes_images, generate, generate_solving, to_uint8
    from octavo.processes import launched
    from octavo.report import check_images_place, save_images
    from octavo.runtimes import accelerate, with_reuse

    solver = solver_name(scheduler) if scheduler is not None else None
    solving = solver if solver in ADAPTIVE else None
    tolerances = {name: value for name, value in (("rtol", rtol), ("atol", atol)) if value is not None}
    of_steps = {"--steps": steps, "--trajectory": trajectory, "--reuse": reuse, "--eta": given.eta}
    _check_options(solving, of_steps, tolerances)
    check_images_place(out)
    check_precision(precision, runtime)
    pipeline = load_quietly(model)
    check_makes_images(pipeline)
    inputs = given.inputs(pipeline)
    if scheduler is not None and not solving:
        pipeline = with_scheduler(pipeline, scheduler)
    pipeline = on_trajectory(pipeline, trajectory)
    num_steps = 0 if solving else steps_for(pipeline, steps)
    check_number_of_steps(pipeline, num_steps)  # before the network is compiled
    batch_size = 1 if solving else min(batch_size, num_images)
    plan = reuse_plan(pipeline, reuse, num_steps, inputs)
    if not launched():  # else each process samples all, and the last one's file is whole as well
        context.with_resource(holding(out))
    if runtime is not Runtime.torch:
        pipeline = accelerate(
            pipeline,
            runtime.value,
            precision=precision.value,
            batch_size=batch_size,
            inputs=inputs,
            reuse=plan,
        )
    elif plan is not None:
        pipeline = with_reuse(pipeline, plan)
    start = time.perf_counter()
    figures: dict[str, Any] = {"out": str(out), "num_images": num_images}
    if solving:
        solved = generate_solving(
            pipeline, solving, num_images, seed=seed, inputs=inputs, tolerances=tolerances
        )
        images, mean = solved.images, sum(solved.evaluations) / num_images
        figures |= {"scheduler": solving, "evaluations": list(solved.evaluations)}
        how = f"{solving}, {mean:.1f} evaluations of the network for an image"
    else:
        images = generate(
            pipeline, num_images, steps=num_steps, seed=seed, batch_size=batch_size, inputs=inputs
        )
        figures |= {"scheduler": type(pipeline.scheduler).__name__, "steps": num_steps}
        how = f"{num_steps} steps"
    seconds = time.perf_counter() - start
    written = save_images(to_uint8(images), out)
    figures["seconds"] = round(seconds, 3)
    print_figures(figures, json, f"{written}, {num_images / seconds:.2f} images/s ({runtime.value}, {how})")


def _check_options(solving: str | None, given: dict[str, Any], tolerances: dict[str, float]) -> None:
    """Raise `OctavoError` for an option that the solver would not heed."""
    from octavo.errors import OctavoError

    for option, value in given.items():
        if solving and value is not None:
            raise OctavoError(f"{option}: {solving} chooses its steps itself; leave it out, or give --rtol")
    if not solving and tolerances:
        raise OctavoError(f"--{next(iter(tolerances))}: is for --scheduler rk45 and adaptive; leave it out")

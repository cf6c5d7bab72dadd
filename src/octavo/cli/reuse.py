"""`octavo reuse`: which of a sampler's steps may reuse the deep features of an earlier one."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Annotated

import typer

from octavo.cli.inputs import Given, command_with, takes_inputs
from octavo.cli.shared import (
    BatchSizeOption,
    JsonOption,
    ModelArgument,
    PrecisionChoice,
    PrecisionOption,
    Runtime,
    RuntimeOption,
    SchedulerOption,
    StepsOrTrajectorysOption,
    ThreadsOption,
    TrajectoryOption,
    check_precision,
    load_quietly,
    on_trajectory,
    print_figures,
    steps_for,
)


@takes_inputs
def command(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = Path("reuse.json"),
    recompute: Annotated[
        int | None,
        typer.Option(min=1, help="Steps that compute the whole network (default: a third of them)."),
    ] = None,
    even: Annotated[
        bool, typer.Option("--even", help="Evenly spaced whole steps instead of those of least error.")
    ] = False,
    depth: Annotated[
        int,
        typer.Option(
            min=1, help="Skip connections (transformers: blocks at either end) that every step computes."
        ),
    ] = 1,
    order: Annotated[
        int,
        typer.Option(
            min=0,
            max=2,
            help="0: features are reused as they are; 1 or 2: forecast from the last two or three whole steps.",
        ),
    ] = 1,
    max_age: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most steps that features may serve (default: any; of forecasts 8, 5 at order 2, or twice as many as "
            "--recompute leaves between whole steps).",
        ),
    ] = None,
    steps: StepsOrTrajectorysOption = None,
    trajectory: TrajectoryOption = None,
    scheduler: SchedulerOption = None,
    runtime: RuntimeOption = Runtime.openvino,
    precision: PrecisionOption = PrecisionChoice.f32,
    num_images: Annotated[int, typer.Option(min=1, help="Images that costs are means over.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the measurement, in a range of its own.")] = 0,
    batch_size: BatchSizeOption = 16,
    threads: ThreadsOption = None,
    *,
    given: Given,
    json: JsonOption = False,
) -> None:
    """Choose the steps at which MODEL, quantized or not, computes its whole network; the others compute its outer part
    alone, on deep features that are forecast from the last whole steps (TaylorSeer, 2503.06923) or reused as they are
    (DeepCache, 2312.00858). Measured on the network as it runs, chosen by dynamic programming.
    """
    from octavo.diffusion import find_denoiser, probe
    from octavo.diffusion.reuse.plan import check_whole_steps
    from octavo.diffusion.reuse.weights import output_weights
    from octavo.diffusion.samplers import with_scheduler
    from octavo.errors import OctavoError
    from octavo.evaluation.reuse_search import MAX_AGES, check_depth, measure_reuse
    from octavo.places import check_file_place
    from octavo.runtimes import accelerate

    if runtime in (Runtime.onnx, Runtime.torch_cuda):
        raise OctavoError(f"--runtime: {runtime} does not reuse features; take openvino or torch")
    check_file_place(out)
    check_precision(precision, runtime)
    pipeline = load_quietly(model)
    inputs = given.inputs(pipeline)
    if scheduler is not None:
        pipeline = with_scheduler(pipeline, scheduler)
    pipeline = on_trajectory(pipeline, trajectory)
    check_depth(find_denoiser(pipeline)[1], depth)
    output_weights(pipeline.scheduler, [0.0])  # raises for a scheduler that tells no noise levels
    num_steps = steps_for(pipeline, steps)
    visited = len(dict.fromkeys(probe(pipeline, num_inference_steps=num_steps, inputs=inputs).timesteps))
    whole = recompute or max(1, round(visited / 3))
    batch_size = min(batch_size, num_images)
    if max_age is None and order:
        max_age = max(MAX_AGES[order], 2 * math.ceil(num_steps / (recompute or num_steps)))
    check_whole_steps(visited, whole, max_age, even=even)
    if runtime is Runtime.openvino:
        pipeline = accelerate(pipeline, precision=precision.value, batch_size=batch_size, inputs=inputs)
    costs = measure_reuse(
        pipeline,
        num_steps,
        depth=depth,
        order=order,
        max_age=max_age,
        images=num_images,
        seed=seed,
        batch_size=batch_size,
        inputs=inputs,
    )
    plan = costs.plan(whole, even=even)
    plan.save(out)
    speed = costs.speed_up(whole)
    milliseconds = [1000 * seconds for seconds in costs.seconds]
    spaced = plan.facts["cost_of_uniform"]
    sampler: list[object] = [] if scheduler is None else ["--scheduler", scheduler]
    sampler += [] if trajectory is None else ["--trajectory", trajectory]
    parts: list[object] = [
        "sample",
        model,
        *sampler,
        "--reuse",
        out,
        "--steps",
        num_steps,
        "--out",
        "grid.png",
    ]
    text = (
        f"{plan}\n"
        f"error of the final image, mean square: {plan.facts['cost']:.3g}"
        f"{'' if spaced is None else f' (evenly spaced: {spaced:.3g})'}\n"
        f"an evaluation of {batch_size}: whole {milliseconds[0]:.1f} ms, outer part {milliseconds[1]:.1f} ms; "
        f"{speed:.2f}x by this plan\n"
        f"plan: {shlex.quote(str(out))}\n"
        f"next: {command_with(given, *parts)}"
    )
    print_figures({"out": str(out), **plan.to_dict(), "expected_speed_up": round(speed, 3)}, json, text)

"""`octavo trajectory`: fewer steps, on the timesteps that serve this very network best."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
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
    ThreadsOption,
    check_precision,
    evaluations_told,
    load_quietly,
    print_figures,
)


@takes_inputs
def command(
    model: ModelArgument,
    steps: Annotated[int, typer.Option(min=1, help="K: how many timesteps to visit.")],
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = Path("trajectory.json"),
    method: Annotated[
        str,
        typer.Option(
            help="dp (dynamic programming: the optimum), grid (every trajectory on a grid of noise levels, up to 6 "
            "steps), descent (local search by FD); or a spacing: linear, leading, trailing, linspace, quadratic, "
            "karras, beta, ays_sd, ays_sdxl."
        ),
    ] = "dp",
    objective: Annotated[
        str | None,
        typer.Option(
            help="trajectory (distance to a fine trajectory; default of dp and grid), elbo (the variational bound), fd "
            "(Frechet distance of the images; default of descent)."
        ),
    ] = None,
    scheduler: SchedulerOption = None,
    runtime: RuntimeOption = Runtime.openvino,
    precision: PrecisionOption = PrecisionChoice.f32,
    candidates: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Timesteps to choose from, evenly spaced (default 100, or all of a shorter schedule; of a "
            "model that clips images more than 200 are a worse reference).",
        ),
    ] = None,
    num_images: Annotated[int, typer.Option(min=2, help="Images that costs of jumps are means over.")] = 64,
    fd_images: Annotated[int, typer.Option(min=8, help="Images of each Frechet distance.")] = 512,
    finalists: Annotated[
        int,
        typer.Option(min=1, help="grid, fd: trajectories whose FD is measured, the best by trajectory cost."),
    ] = 32,
    max_scores: Annotated[int, typer.Option(min=1, help="descent: Frechet distances that it may take.")] = 80,
    mantissas: Annotated[
        str, typer.Option(help="grid: noise levels m 10^e, for each of these m and every decade e.")
    ] = "1,3",
    features: Annotated[
        str | None,
        typer.Option(
            help="fd: digits, inception, or an .xml or .onnx network (default: digits for 16x16 grey, else inception)."
        ),
    ] = None,
    real_images: Annotated[
        Path | None,
        typer.Option(help="fd: real images (digits: bundled; none: the model's own in 100 steps)."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the search, in a range of seeds of its own.")] = 0,
    batch_size: BatchSizeOption = 16,
    threads: ThreadsOption = None,
    *,
    given: Given,
    json: JsonOption = False,
) -> None:
    """Search the K timesteps that MODEL, quantized or not, should visit; searched on its network as it will run.

    --eta is kept in the file: fd samples with it, and so does whatever goes by the trajectory.

    Killed and started again with the same arguments, it goes on after the last finished batch.
    """
    from octavo.diffusion import sample_shape
    from octavo.diffusion.samplers import with_scheduler
    from octavo.diffusion.trajectories.eta import with_eta
    from octavo.diffusion.trajectories.use import check_visits
    from octavo.diffusion.trajectories.visit import BY_FORMULA, check_visits_all
    from octavo.evaluation.target import Target
    from octavo.evaluation.trajectory_methods import (
        SEARCHES,
        SearchOptions,
        check_eta,
        check_search_seed,
        chosen_objective,
        search_cost,
    )
    from octavo.evaluation.trajectory_search import search_trajectory
    from octavo.places import check_file_place
    from octavo.runtimes import accelerate

    objective = chosen_objective(method, objective)
    options = SearchOptions(
        candidates=candidates,
        images=num_images,
        fd_images=fd_images,
        finalists=finalists,
        max_scores=max_scores,
        mantissas=_numbers(mantissas),
    )
    check_search_seed(seed, method, objective, options, batch_size)
    check_file_place(out)
    check_precision(precision, runtime)
    pipeline = load_quietly(model)
    inputs = given.inputs(pipeline)
    eta = inputs.pop("eta", None)
    if scheduler is not None:
        pipeline = with_scheduler(pipeline, scheduler)
    if eta is not None:
        check_eta(objective, eta)
        pipeline = with_eta(pipeline, eta)
    check_visits(pipeline.scheduler)
    if method in SEARCHES:
        check_visits_all(pipeline, inputs, BY_FORMULA)
    target = None
    if objective == "fd":
        target = Target.of(features, real_images, sample_shape(pipeline, inputs))
    known = target is None or not target.of_model
    cost = search_cost(pipeline.scheduler, steps, method, objective, options, known, batch_size)
    if cost:
        told = f"search: at most {cost:,} evaluations of the network, one for each image"
        print(f"{told}; what an earlier run left is not made again", file=sys.stderr)
    if runtime is not Runtime.torch and cost:
        pipeline = accelerate(
            pipeline, runtime.value, precision=precision.value, batch_size=batch_size, inputs=inputs
        )
    kept: list[int] = []
    found = search_trajectory(
        pipeline,
        steps,
        method,
        objective,
        target=target,
        options=options,
        seed=seed,
        batch_size=batch_size,
        inputs=inputs,
        eta=eta,
        on_kept=kept.append,
    )
    found.save(out)
    solver = [] if scheduler is None else ["--scheduler", scheduler]
    parts: list[object] = ["sample", model, *solver, "--trajectory", out, "--out", "grid.png"]
    screened = found.facts.get("screened_by")
    heuristic = (
        f"the best of {found.facts.get('finalists')} by FD, of all on the grid screened by {screened}\n"
    )
    text = (
        f"{found}\n{heuristic if screened else ''}"
        f"{evaluations_told(found.network_evaluations, sum(kept))}\n"
        f"trajectory: {shlex.quote(str(out))}\n"
        f"next: {command_with(replace(given, eta=None), *parts)}"
    )
    print_figures({"out": str(out), **found.to_dict()}, json, text)


def _numbers(text: str) -> tuple[float, ...]:
    from octavo.errors import OctavoError

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise OctavoError(f"--mantissas: {text!r} is not a list like 1,3") from error

"""`octavo analytic`: a pipeline sampled with optimal variances, measured on its own network (Analytic-DPM)."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

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
    ThreadsOption,
    TrajectoryOption,
    check_precision,
    evaluations_told,
    load_quietly,
    on_trajectory,
    print_figures,
)


@takes_inputs
def command(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="The pipeline folder to write.")],
    kind: Annotated[
        str, typer.Option(help="ddpm, or ddim (eta 0, with noise where DDIM has none).")
    ] = "ddpm",
    trajectory: TrajectoryOption = None,
    own_timesteps: Annotated[
        int | None,
        typer.Option(
            metavar="K", min=2, help="Visit the K timesteps that leave the least divergence (2201.06503)."
        ),
    ] = None,
    runtime: RuntimeOption = Runtime.openvino,
    precision: PrecisionOption = PrecisionChoice.f32,
    candidates: Annotated[
        int | None, typer.Option(min=2, help="Timesteps to measure at, evenly spaced (default 100).")
    ] = None,
    num_images: Annotated[int, typer.Option(min=8, help="Images that Gamma is a mean over.")] = 128,
    last_noise: Annotated[
        float, typer.Option(min=0, help="Mean size of the last noise at most, in levels of 8 bits.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the measurement, in a range of its own.")] = 0,
    batch_size: BatchSizeOption = 16,
    threads: ThreadsOption = None,
    *,
    given: Given,
    json: JsonOption = False,
) -> None:
    """Measure how sure MODEL's network is at each timestep, and write the pipeline with the variances that follow.

    A quantized MODEL stays quantized, and is measured in its integers: quantize first, then this. Killed and started
    again with the same arguments, it goes on after the last finished batch.
    """
    from octavo.checkpoint import save_pipeline
    from octavo.checkpoint.save import check_target
    from octavo.diffusion.analytic import (
        analytic_trajectory,
        cost_of_gamma,
        estimate_gamma,
        with_analytic_variance,
    )
    from octavo.diffusion.analytic.estimate import candidates_for
    from octavo.diffusion.analytic.variance import check_kind
    from octavo.diffusion.generators import check_seed
    from octavo.diffusion.trajectories import steps_of, with_trajectory
    from octavo.diffusion.trajectories.jump_costs import SEED_STREAM
    from octavo.diffusion.trajectories.visit import check_visits_all
    from octavo.errors import OctavoError
    from octavo.evaluation.shards import executed
    from octavo.runtimes import accelerate

    check_kind(kind)
    check_seed(seed, SEED_STREAM, num_images)
    if trajectory is not None and own_timesteps is not None:
        raise OctavoError("--own-timesteps: --trajectory names others; give one of the two")
    if Path(model).is_dir() and out.resolve() == Path(model).resolve():
        raise OctavoError(f"--out: {out} is the model itself, which would be replaced; choose another folder")
    check_target(out)
    check_precision(precision, runtime)
    pipeline = on_trajectory(load_quietly(model), trajectory)
    inputs = given.inputs(pipeline)
    if "eta" in (inputs or {}):
        raise OctavoError("--eta: the optimal variances take its place; leave it out")
    timesteps = candidates_for(pipeline, candidates)
    check_visits_all(pipeline, inputs)
    if own_timesteps is not None and own_timesteps > len(timesteps):
        raise OctavoError(f"--own-timesteps: {own_timesteps} is more than the {len(timesteps)} candidates")
    cost = cost_of_gamma(len(timesteps), num_images, pipeline.scheduler.config.num_train_timesteps)
    told = f"gamma: at most {cost:,} evaluations of the network, one for each image"
    print(f"{told}; what an earlier run left is not made again", file=sys.stderr)
    fast = pipeline
    if runtime is not Runtime.torch:
        fast = accelerate(
            pipeline, runtime.value, precision=precision.value, batch_size=batch_size, inputs=inputs
        )
    engine, networks = executed(fast)
    kept: list[int] = []
    gamma = estimate_gamma(
        fast,
        candidates=timesteps,
        images=num_images,
        seed=seed,
        batch_size=batch_size,
        inputs=inputs,
        networks=networks,
        runtime=engine,
        on_kept=kept.append,
    )
    analytic = with_analytic_variance(pipeline, gamma, kind, last_noise=last_noise)
    if own_timesteps is not None:
        analytic = with_trajectory(analytic, analytic_trajectory(analytic.scheduler, gamma, own_timesteps))
    save_pipeline(analytic, out)
    steps = steps_of(analytic, 25)
    parts: list[object] = ["sample", out, "--steps", steps, "--out", "grid.png"]
    figures: dict[str, Any] = {
        "out": str(out),
        "kind": kind,
        "scheduler": type(analytic.scheduler).__name__,
        "trajectory": analytic.scheduler.config.get("trajectory"),
        "gamma": gamma.to_dict(),
    }
    text = (
        f"{shlex.quote(str(out))}: {figures['scheduler']} ({kind}), Gamma at {len(timesteps)} timesteps from "
        f"{gamma.images} images\n"
        f"{evaluations_told(gamma.network_evaluations, sum(kept))}\n"
        f"next: {command_with(given, *parts)}"
    )
    print_figures(figures, json, text)

"""What several commands share: the arguments' forms, loading, printing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.files import read_json
from octavo.named import can_be_read_again, check_model

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from octavo.diffusion.reuse import ReusePlan
    from octavo.processes import Processes


class Runtime(StrEnum):
    """What evaluates the denoiser."""

    openvino = "openvino"
    onnx = "onnx"
    torch_cuda = "torch-cuda"
    torch = "torch"


class PrecisionChoice(StrEnum):
    """Precision of what stays float in the int8 graph."""

    auto = "auto"
    f32 = "f32"
    bf16 = "bf16"


def _limit_threads(context: typer.Context, threads: int | None) -> int | None:
    """Until the command ends, whatever computes takes so many threads."""
    if threads is not None:
        from octavo.runtimes import limited_threads

        context.with_resource(limited_threads(threads))
    return threads


def check_given_model(name: str | None) -> str | None:
    """`named.check_model` as a callback: before the command imports what takes seconds."""
    if name is not None:
        check_model(name)
    return name


def check_given_json(file: Path | None) -> Path | None:
    """The same of a file that is to be JSON, unless it is a pipe: what is read of one is gone."""
    if file is not None and can_be_read_again(file):
        read_json(file)
    return file


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A pipeline folder, a hub id, or 'digits' (bundled).",
        callback=check_given_model,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Images denoised together.")]
MOST_THREADS = 1024
"""Of more, libraries run out of memory before they start."""
StepsOption = Annotated[int, typer.Option(min=1, help="Sampler steps.")]
StepsOrTrajectorysOption = Annotated[
    int | None, typer.Option(min=1, help="Sampler steps (default: 50, or the trajectory's).")
]
TrajectoryOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Visit the timesteps that `octavo trajectory` wrote.",
        callback=check_given_json,
    ),
]
ReuseOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Reuse deep features between steps by what `octavo reuse` wrote.",
        callback=check_given_json,
    ),
]
SchedulerOption = Annotated[
    str | None,
    typer.Option(
        help="ddim, ddpm, dpmsolver++, dpmsolver++sde, unipc, deis, pndm, heun, euler, euler_ancestral, "
        "predictor_corrector, or a diffusers class (default: the model's own)."
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, help="Image k uses seed + k alone.")]
RuntimeOption = Annotated[Runtime, typer.Option(help="What evaluates MODEL's network.")]
PrecisionOption = Annotated[
    PrecisionChoice, typer.Option(help="Precision of what stays float; auto measures which is faster.")
]
ReferenceOption = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="The full-precision model it came from.", callback=check_given_model),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST_THREADS,
        callback=_limit_threads,
        help="CPU threads of torch and of the engine (default: all cores).",
    ),
]
"""Works as soon as it is given; a command that takes it has nothing left to do."""


def check_precision(precision: PrecisionChoice, *runtimes: Runtime) -> None:
    """Raise `OctavoError` where bf16 is asked for and nothing but torch, which goes by the model's dtype, evaluates."""
    if precision is PrecisionChoice.bf16 and set(runtimes) == {Runtime.torch}:
        from octavo.errors import OctavoError

        raise OctavoError(
            "--precision: --runtime torch computes in the model's own dtype; leave bf16 out, or take another runtime"
        )


def load_quietly(model: str) -> DiffusionPipeline:
    """Load a pipeline without diffusers' own progress bars and log lines."""
    import diffusers.utils.logging

    from octavo.checkpoint import load

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    pipeline = load(model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def on_trajectory(pipeline: DiffusionPipeline, file: Path | None) -> DiffusionPipeline:
    """The pipeline on the trajectory of `file`; as it is without one. Raises `OctavoError`, which names the file."""
    if file is None:
        return pipeline
    from octavo.diffusion.trajectories import Trajectory, with_trajectory
    from octavo.diffusion.trajectories.use import check_visits
    from octavo.errors import OctavoError

    trajectory = Trajectory.load(file)
    check_visits(pipeline.scheduler)
    try:
        return with_trajectory(pipeline, trajectory)
    except OctavoError as error:
        raise OctavoError(f"{file}: {error}") from error


def steps_for(pipeline: DiffusionPipeline, given: int | None, default: int = 50) -> int:
    """The steps that were asked for; else those of the pipeline's own trajectory, or the default.

    Raises `OctavoError` if another number is asked for than its trajectory has.
    """
    from octavo.diffusion.trajectories import steps_of
    from octavo.errors import OctavoError

    own = steps_of(pipeline, given or default)
    if given not in (None, own):
        raise OctavoError(f"--steps: {given}, but the model's trajectory has {own}; leave it out")
    return own


def reuse_plan(
    pipeline: DiffusionPipeline, file: Path | None, steps: int, inputs: dict[str, Any]
) -> ReusePlan | None:
    """The reuse plan of `file`; None without one.

    Raises `OctavoError` where the sampler is another than the plan was made for, or visits other timesteps: all of the
    plan's, or those in a row that an image-to-image run leaves of them.
    """
    if file is None:
        return None
    from octavo.diffusion import probe
    from octavo.diffusion.reuse import ReusePlan
    from octavo.errors import OctavoError

    plan = ReusePlan.load(file)
    again = "make a plan with the same --steps, --scheduler and --trajectory"
    solver, own = plan.facts.get("solver"), type(pipeline.scheduler).__name__
    if solver not in (None, own):
        raise OctavoError(f"{file}: is for {str(solver)[:60]}, and this sampler is {own}; {again}")
    run = probe(pipeline, num_inference_steps=steps, inputs=inputs)
    visited = tuple(dict.fromkeys(run.timesteps))
    first = plan.timesteps.index(visited[0]) if visited[0] in plan.timesteps else 0
    in_a_row = plan.timesteps[first : first + len(visited)] == visited
    if not in_a_row or (len(visited) < plan.num_steps and not run.skipped):
        shared = len(set(visited) & set(plan.timesteps))
        raise OctavoError(
            f"{file}: is for {plan.num_steps} timesteps, and this sampler's {steps} steps visit {len(visited)}, "
            f"{shared} of them the plan's; {again}"
        )
    return plan


def evaluations_told(count: int, kept: int) -> str:
    """How many evaluations of the network something took, and how many of them an earlier run had left.

    >>> evaluations_told(6400, 0), evaluations_told(6400, 1600)
    ('6,400 evaluations of the network', '6,400 evaluations of the network, 1,600 of them kept from an earlier run')
    """
    told = f"{count:,} evaluations of the network"
    return f"{told}, {kept:,} of them kept from an earlier run" if kept else told


def print_figures(figures: Any, as_json: bool, text: str) -> None:
    """The figures as JSON on request, else as text, on standard output."""
    print(json.dumps(figures, indent=2) if as_json else text)


@contextmanager
def holding(out: Path, processes: Processes | None = None) -> Iterator[None]:
    """Hold the place of a command's output, by its first process, while it works: `writers.only_writer`.

    Raises `OctavoError` in all of them while another command writes there, or where nothing can be written.
    """
    from octavo.errors import OctavoError
    from octavo.processes import Processes
    from octavo.writers import only_writer

    processes = processes or Processes()
    refused: OctavoError | None = None
    with ExitStack() as stack:
        if processes.is_first:
            try:
                stack.enter_context(only_writer(out))
            except OctavoError as error:
                refused = error
        if not processes.agree([refused is None])[0]:
            raise refused or OctavoError(f"{out}: the first process cannot write there; its line says why")
        yield

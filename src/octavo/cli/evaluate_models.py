"""The first form of `octavo evaluate`: two models, the same seeds, in one process or in several."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from octavo.cli.evaluate_costs import cost_table, measured_costs, precision_of
from octavo.cli.inputs import Given
from octavo.cli.shared import holding, load_quietly, on_trajectory, reuse_plan, steps_for
from octavo.diffusion import sample_shape
from octavo.diffusion.exchange import same_scheduler
from octavo.diffusion.samplers import with_scheduler
from octavo.errors import OctavoError
from octavo.evaluation.compare import compare
from octavo.evaluation.comparison import Comparison
from octavo.evaluation.cost import Cost
from octavo.evaluation.features import chosen_features, default_features
from octavo.evaluation.generate import check_makes_images, to_uint8
from octavo.evaluation.real_data import real_data
from octavo.evaluation.shards import ShardStore, generate_shards
from octavo.evaluation.verdict import verdict
from octavo.files import atomic_files, write_json
from octavo.places import check_place
from octavo.processes import Processes, join_processes, launched, leave_processes
from octavo.runtimes import accelerate, audit, with_reuse

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from octavo.diffusion.reuse import ReusePlan

PRECISIONS = ("f32", "bf16")


KEPT = ("images.npz", "reference-images.npz", "figures.json")


@dataclass(frozen=True)
class ModelsJob:
    """What was asked on the command line. `runtimes`: the model's and the reference's. `inputs`: read from `given`."""

    model: str
    reference: str
    num_images: int
    steps: int | None
    scheduler: str | None
    trajectory: Path | None
    reuse: Path | None
    features: str | None
    seed: int
    batch_size: int
    runtimes: tuple[str, str]
    precision: str
    threads: int | None
    given: Given
    real_images: Path | None
    extrapolate: bool
    cost: bool
    out: Path | None
    inputs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """The figures as JSON and as text."""

    figures: dict[str, Any]
    text: str


def evaluate_models(job: ModelsJob) -> Result | None:
    """Generate, compare, measure. None in every process but the first."""
    processes = join_processes()
    try:
        if job.out is None:
            return _evaluate(job, processes)
        seal = job.out / KEPT[-1]
        check_place(seal)
        with holding(seal, processes):
            return _evaluate(job, processes)
    finally:
        leave_processes()


def _evaluate(job: ModelsJob, processes: Processes) -> Result | None:
    seconds: dict[str, float] = {}
    lap = _timer()
    threads = job.threads or (1 if launched() else torch.get_num_threads())
    torch.set_num_threads(threads)
    names = (job.model, job.reference)
    plain = [load_quietly(name) for name in names]
    check_makes_images(plain[0])
    if job.scheduler is not None:
        plain = [with_scheduler(pipeline, job.scheduler) for pipeline in plain]
    plain = [on_trajectory(pipeline, job.trajectory) for pipeline in plain]
    steps = steps_for(plain[0], job.steps)
    job = replace(job, steps=steps, inputs=job.given.inputs(plain[0]))
    reused = reuse_plan(plain[0], job.reuse, steps, job.inputs)
    shape = _image_shape(plain, job)
    if job.scheduler is None:
        _check_schedulers(plain, job)
    spec = job.features or default_features(shape)
    extractor, real = chosen_features(spec), real_data(spec, job.real_images, shape)
    running = [
        _on_runtime(pipeline, runtime, job, threads, processes, plan)
        for pipeline, runtime, plan in zip(plain, job.runtimes, (reused, None), strict=True)
    ]
    seconds["prepare"] = lap()
    stores: list[ShardStore] = []
    for pipeline, label in zip(running, ("model", "reference"), strict=True):
        store = generate_shards(
            pipeline,
            job.num_images,
            steps=steps,
            seed=job.seed,
            batch_size=job.batch_size,
            inputs=job.inputs,
            processes=processes,
            label=label,
        )
        stores.append(store)
        seconds[f"generate_{label}"] = lap()
    if not processes.is_first:
        return None
    floats = [store.images() for store in stores]
    pixels = [to_uint8(images) for images in floats]
    compared = compare(
        *pixels,
        extractor=extractor,
        real=real,
        paired=True,
        floats=floats[0],
        reference_floats=floats[1],
        seed=job.seed,
        extrapolate=job.extrapolate,
    )
    seconds["compare"] = lap()
    costs = measured_costs(job, plain, running, threads, reused) if job.cost else None
    seconds["cost"] = lap()
    facts = {
        "scheduler": type(running[0].scheduler).__name__,
        "threads": threads,
        "processes": processes.count,
        "precision": precision_of(running[0]),
        "layers_in_int8": _layers_in_int8(running[0]),
    }
    result = _result(job, facts, compared, costs, {key: round(value, 3) for key, value in seconds.items()})
    if job.out is not None:
        _keep(job.out, pixels, result)
    for store in stores:
        store.remove()
    return result


def _timer() -> Callable[[], float]:
    """A function that gives the seconds since it was last called."""
    last = time.perf_counter()

    def lap() -> float:
        nonlocal last
        before, last = last, time.perf_counter()
        return last - before

    return lap


def _check_schedulers(pipelines: list[DiffusionPipeline], job: ModelsJob) -> None:
    """Raise `OctavoError` if the two sample differently: that would pass for an error of quantization."""
    if not same_scheduler(*pipelines):
        ours, theirs = (type(pipeline.scheduler).__name__ for pipeline in pipelines)
        raise OctavoError(
            f"--scheduler: {job.model} samples by {ours}, {job.reference} by {theirs} or with other settings; name one "
            "for both"
        )


def _image_shape(pipelines: list[DiffusionPipeline], job: ModelsJob) -> tuple[int, ...]:
    """(height, width, channels) that both networks denoise, of latents too; zeros if they are no pictures.

    Raises `OctavoError` if the two differ.
    """
    ours, theirs = (sample_shape(pipeline, job.inputs) for pipeline in pipelines)
    if ours != theirs:
        raise OctavoError(
            f"--reference: {job.reference} denoises {theirs}, {job.model} {ours} (height, width, channels); they are "
            "not one model"
        )
    return ours


def _on_runtime(
    pipeline: DiffusionPipeline,
    runtime: str,
    job: ModelsJob,
    threads: int,
    processes: Processes,
    plan: ReusePlan | None,
) -> DiffusionPipeline:
    """The pipeline on its runtime, in all processes in the same precision: the first one's choice, where it is free."""
    if runtime == "torch":
        return pipeline if plan is None else with_reuse(pipeline, plan)

    def accelerated(precision: Any) -> DiffusionPipeline:
        return accelerate(
            pipeline,
            runtime,
            precision=precision,
            threads=threads,
            batch_size=job.batch_size,
            inputs=job.inputs,
            reuse=plan,
        )

    with processes.first_ahead():
        fast = accelerated(job.precision)
    own = PRECISIONS.index(precision_of(fast) or "f32")
    (agreed,) = processes.agree([own])
    return fast if agreed == own else accelerated(PRECISIONS[agreed])


def _layers_in_int8(pipeline: DiffusionPipeline) -> str:
    rows = audit(pipeline)
    return f"{sum(row.ok for row in rows)} of {len(rows)}"


def _result(
    job: ModelsJob,
    facts: dict[str, Any],
    compared: Comparison,
    costs: tuple[Cost, Cost] | None,
    seconds: dict[str, float],
) -> Result:
    said = verdict(compared, *(costs or ()))
    asked = {
        key: value
        for key, value in asdict(replace(job, inputs={})).items()
        if key not in ("cost", "out", "threads", "precision", "given")
    }
    figures = {
        **asked,
        "inputs": job.given.recorded(),
        "real_images": str(job.real_images) if job.real_images else None,
        "trajectory": str(job.trajectory) if job.trajectory else None,
        "reuse": str(job.reuse) if job.reuse else None,
        **facts,
        "comparison": compared.as_json(),
        "cost": None if costs is None else {"model": costs[0].as_json(), "reference": costs[1].as_json()},
        "seconds": seconds,
        "verdict": said,
    }
    last = job.seed + job.num_images - 1
    head = (
        f"{job.model} ({', '.join(filter(None, (job.runtimes[0], facts['precision'])))}) against "
        f"{job.reference} ({job.runtimes[1]}): {job.num_images:,} images each, seeds {job.seed} to {last}, "
        f"{facts['scheduler']}, {job.steps} steps, batch {job.batch_size}, "
        f"{facts['processes']} x {facts['threads']} threads"
    )
    parts = [
        head,
        compared.as_text(),
        *([cost_table(*costs, job.batch_size, job.reuse is not None)] if costs else []),
    ]
    return Result(figures, "\n\n".join(parts) + f"\n\nverdict: {said}")


def _keep(out: Path, pixels: list[Any], result: Result) -> None:
    """Write images.npz, reference-images.npz (arr_0 uint8 NHWC) and figures.json into `out`, all of this run."""
    with atomic_files(out, KEPT) as temporary:
        for name, array in zip(KEPT, pixels, strict=False):
            np.savez(temporary / name, arr_0=array)
        write_json(temporary / KEPT[-1], result.figures)

"""The networks that `octavo tune` chooses among: quantized by each recipe once, executed, timed in turn."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from octavo.calibration import PTQ4DM, calibrate, named_recipe
from octavo.calibration.collect import plan_batches
from octavo.checkpoint import load, prepare_to_save, save_pipeline
from octavo.diffusion import find_denoiser, first_call, probe
from octavo.diffusion.samplers import with_scheduler
from octavo.diffusion.trajectories import Trajectory, spaced, with_trajectory
from octavo.diffusion.trajectories.bound import plain_name
from octavo.diffusion.trajectories.schedulers import ADAPTERS, lowest_timestep
from octavo.errors import OctavoError
from octavo.evaluation.machine import machine
from octavo.evaluation.shards import executed
from octavo.evaluation.speed import take_turns
from octavo.evaluation.trajectory_methods import SearchOptions
from octavo.evaluation.trajectory_search import search_trajectory
from octavo.files import read_json, write_json
from octavo.fingerprint import pipeline_fingerprint, versions
from octavo.runtimes import accelerate
from octavo.study.tune_search import Choice, Curve
from octavo.study.tune_spending import Spending

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FLOAT = "float"
"""The recipe's name for the full-precision network."""
DP = "dp"
"""The spacing's name for timesteps searched on the network itself, by dynamic programming for the trajectory cost."""
ROUNDS, WARM_UP = 9, 2
"""Of timing, in turn."""


@dataclass
class Networks:
    """Pipelines by recipe: as they can be saved, and as they execute; and the seconds of one evaluation an image.

    `seed`: of the searches' images.
    """

    plain: dict[str, DiffusionPipeline]
    fast: dict[str, DiffusionPipeline]
    seconds: dict[str, float]
    folder: Path
    batch_size: int
    inputs: Mapping[str, Any] | None
    search: SearchOptions
    progress: bool
    seed: int
    spending: Spending
    left_out: list[str] = field(default_factory=list)
    """What turned out not to fit once its timesteps were known, and why."""
    _found: dict[tuple[str, str, int], Trajectory] = field(default_factory=dict)

    def on(self, choice: Curve, steps: int, plain: bool = False) -> DiffusionPipeline:
        """The pipeline of a curve at a number of steps; `plain`: the one that can be saved."""
        pipeline = with_scheduler((self.plain if plain else self.fast)[choice.recipe], choice.solver)
        return with_trajectory(pipeline, self.trajectory(choice, steps))

    def trajectory(self, curve: Curve, steps: int) -> Trajectory:
        """The timesteps of a curve at a number of steps; those of the spacing "dp" are searched."""
        own = self.fast[curve.recipe]
        sampler = with_scheduler(own, curve.solver)
        if curve.spacing != DP:
            return spaced(sampler.scheduler, curve.spacing, steps)
        where = searched_on(own, sampler)
        measured = curve.recipe, plain_name(where.scheduler)
        if (*measured, steps) not in self._found:
            is_first = not any(known[:2] == measured for known in self._found)
            found = search_trajectory(
                where,
                steps,
                options=self.search,
                seed=self.seed,
                batch_size=self.batch_size,
                inputs=self.inputs,
                workdir=self.folder,
                progress=self.progress and is_first,
            )
            cost = found.network_evaluations if is_first else 0
            with self.spending.stage("search", cost, "search timesteps") as advance:
                advance(cost)
            self._found[*measured, steps] = found
        return self._found[*measured, steps]

    def curve(self, curve: Curve, evaluations: Mapping[int, int]) -> list[Choice]:
        """The choices of a curve: of steps -> evaluations, those that its solver can visit, in the order given."""
        choices = []
        sampler = with_scheduler(self.plain[curve.recipe], curve.solver)
        for steps, count in evaluations.items():
            trajectory = self.trajectory(curve, steps)
            try:
                with_trajectory(sampler, trajectory).scheduler.set_timesteps(steps)
            except OctavoError as error:
                self.left_out.append(f"{curve}, {steps} steps: {error}")
                continue
            choices.append(Choice(curve, steps, count * self.seconds[curve.recipe]))
        return choices


def searched_on(own: DiffusionPipeline, sampler: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline that a solver's timesteps are searched on: `own`, or `sampler`, the same under the solver.

    Costs of jumps are DDIM's whatever the solver, so that they are measured once, on the pipeline's own scheduler,
    where that takes timesteps of one's choice and may end at the same ones (DEIS may not at 0).
    """
    alike = lowest_timestep(own.scheduler) == lowest_timestep(sampler.scheduler)
    return own if alike and plain_name(own.scheduler) in ADAPTERS else sampler


def make_networks(
    pipeline: DiffusionPipeline,
    recipes: Sequence[str],
    folder: Path,
    *,
    calibration: Mapping[str, Any],
    seed: int,
    batch_size: int,
    inputs: Mapping[str, Any] | None,
    search: SearchOptions,
    progress: bool = True,
    spending: Spending | None = None,
) -> Networks:
    """Quantize `pipeline` by each recipe ("float": not at all), put it on OpenVINO with an f32 remainder, and time it.

    Quantized pipelines and times are kept in `folder` under the names of all that decides them: called again with the
    same arguments, nothing is made twice, and choices go by the same times; for another model, calibration, batch size,
    number of threads or processor it is made anew. `calibration`: changes of every recipe. Raises `OctavoError` for an
    unknown recipe.
    """
    spending = spending or Spending()
    plain, fast = {}, {}
    for name in recipes:
        if name == FLOAT:
            plain[name] = pipeline
        else:
            recipe = named_recipe(name, **calibration)
            place = folder / f"{name}-{_quantized_name(pipeline, recipe, seed, batch_size, inputs)}"
            pairs = evaluations_of_pairs(pipeline, recipe, seed, batch_size, inputs)
            with spending.stage("calibration", pairs, f"quantize by {name}") as advance:
                if not (place / "model_index.json").is_file():
                    made = calibrate(
                        pipeline, recipe, seed=seed, batch_size=batch_size, inputs=inputs, progress=progress
                    )
                    save_pipeline(prepare_to_save(made), place)
                    advance(pairs)
            plain[name] = load(str(place))
            plain[name].set_progress_bar_config(disable=True)
        fast[name] = accelerate(plain[name], precision="f32", batch_size=batch_size, inputs=inputs)
    call = first_call(pipeline, batch_size=batch_size, inputs=inputs)
    rounds = evaluations_of_timing(len(fast), batch_size)
    with spending.stage("timing", rounds, "time the networks") as advance:
        path = folder / f"seconds-{_timed_name(fast, batch_size, inputs)}.json"
        seconds = _times(fast, call, path, batch_size)
        advance(rounds)
    return Networks(plain, fast, seconds, folder, batch_size, inputs, search, progress, seed, spending)


def evaluations_of_pairs(
    pipeline: DiffusionPipeline,
    recipe: PTQ4DM,
    seed: int,
    batch_size: int,
    inputs: Mapping[str, Any] | None,
) -> int:
    """Evaluations of the network, one for each image, that the calibration pairs of a recipe take."""
    steps = probe(pipeline, num_inference_steps=recipe.steps, inputs=inputs).num_steps
    batches = plan_batches(recipe, steps, seed, batch_size)
    return sum(len(batch.images) * batch.evaluations for batch in batches)


def evaluations_of_timing(num_networks: int, batch_size: int) -> int:
    """Evaluations of the networks, one for each image, that timing them takes."""
    return num_networks * (ROUNDS + WARM_UP) * batch_size


def _quantized_name(
    pipeline: DiffusionPipeline,
    recipe: PTQ4DM,
    seed: int,
    batch_size: int,
    inputs: Mapping[str, Any] | None,
) -> str:
    """SHA-256 (16 hex digits) of everything that decides a quantized pipeline."""
    decisions = [recipe.to_dict(), seed, batch_size, *versions("octavo", "torch", "diffusers").values()]
    return pipeline_fingerprint(pipeline, decisions, inputs)[:16]


def _timed_name(
    pipelines: Mapping[str, DiffusionPipeline], batch_size: int, inputs: Mapping[str, Any] | None
) -> str:
    """SHA-256 (16 hex digits) of everything that decides the seconds: networks, runtime, threads, processor."""
    here = machine()
    conditions = [
        batch_size,
        here["processor"],
        here["cpu_flags"],
        here["threads"],
        *here["versions"].values(),
    ]
    digest = hashlib.sha256()
    for name, pipeline in sorted(pipelines.items()):
        runtime, networks = executed(pipeline)
        digest.update(pipeline_fingerprint(pipeline, [name, runtime, *conditions], inputs, networks).encode())
    return digest.hexdigest()[:16]


def _times(
    pipelines: Mapping[str, DiffusionPipeline],
    call: tuple[tuple[Any, ...], dict[str, Any]],
    path: Path,
    batch_size: int,
) -> dict[str, float]:
    """Median seconds of one evaluation, an image, in turn; those in `path`, if it is there."""
    if path.is_file():
        known = read_json(path)
        if not isinstance(known, dict) or not all(type(known.get(name)) is float for name in pipelines):
            raise OctavoError(f"{path}: not readable as times; delete it and start again")
        return {name: known[name] for name in pipelines}
    args, kwargs = call
    denoisers = {name: find_denoiser(pipeline)[1] for name, pipeline in pipelines.items()}
    with torch.inference_mode():
        timings = take_turns(
            {name: partial(denoiser, *args, **kwargs) for name, denoiser in denoisers.items()},
            rounds=ROUNDS,
            warm_up=WARM_UP,
        )
    seconds = {name: timing.median / batch_size for name, timing in timings.items()}
    write_json(path, seconds)
    return seconds

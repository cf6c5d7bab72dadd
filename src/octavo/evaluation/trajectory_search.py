"""The search of a trajectory on any pipeline, quantized and accelerated or not: methods, objectives, cost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from octavo.diffusion import find_denoiser
from octavo.diffusion.trajectories import Trajectory, noise_schedule, spaced
from octavo.diffusion.trajectories.descent import descend
from octavo.diffusion.trajectories.eta import held_eta, with_eta
from octavo.diffusion.trajectories.grid import cheapest_on_grid, noise_grid
from octavo.diffusion.trajectories.jump_costs import OBJECTIVES, SEED_STREAM, JumpCosts, measure_jump_costs
from octavo.diffusion.trajectories.schedule import NoiseSchedule
from octavo.diffusion.trajectories.schedulers import lowest_timestep
from octavo.diffusion.trajectories.use import check_fits, without_trajectory
from octavo.diffusion.trajectories.visit import BY_FORMULA, check_visits_all
from octavo.errors import OctavoError
from octavo.evaluation.features import extract
from octavo.evaluation.frechet import FeatureStatistics
from octavo.evaluation.generate import to_uint8, whole_batches
from octavo.evaluation.shards import executed, generate_shards
from octavo.evaluation.target import Target
from octavo.evaluation.trajectory_methods import (
    REFERENCE_STEPS,
    REFERENCE_STREAM,
    SEARCHES,
    SearchOptions,
    candidate_timesteps,
    check_search_seed,
    chosen_objective,
    cost_of_reference,
    descent_starts,
    evaluations_on,
    search_cost,
    with_own_eta,
)
from octavo.evaluation.trajectory_score import FORMAT, FrechetScore
from octavo.files import cache_folder
from octavo.fingerprint import model_identity, pipeline_fingerprint, versions
from octavo.work import held

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LIBRARIES = ("octavo", "torch", "diffusers", "numpy", "openvino")


def search_trajectory(
    pipeline: DiffusionPipeline,
    steps: int,
    method: str = "dp",
    objective: str | None = None,
    *,
    target: Target | None = None,
    options: SearchOptions | None = None,
    seed: int = 0,
    batch_size: int = 16,
    inputs: Mapping[str, Any] | None = None,
    eta: float | None = None,
    workdir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    on_kept: Callable[[int], Any] = lambda evaluations: None,
) -> Trajectory:
    """The timesteps that `pipeline`'s solver should visit in `steps` steps, searched on its network as it executes.

    method     "dp": the optimum over candidate timesteps of a cost that is a sum over jumps, by dynamic programming.
               "grid": every trajectory on a grid of noise levels, up to 6 steps; by FD, those that come first by the
               trajectory cost (a heuristic: the best by FD may be among those left out). "descent": local search by FD
               from the spacings and the two winners of dp. Or a spacing's name: "linear", "quadratic", "karras", ...
    objective  "trajectory": the distance to a fine trajectory of the same network. "elbo": the variational bound.
               "fd": the Frechet distance of the images, in the pipeline's own solver, to `target`'s.
    target     features and statistics that "fd" needs; statistics None: the model's own images in 100 steps.
    options    the search's size (`octavo.SearchOptions`): images, candidate timesteps, finalists, mantissas.
    eta        DDIM's, from 0 to 1, with which "fd" samples, and which the trajectory keeps; None: the one that the
               pipeline's scheduler holds (`with_eta`), or 0. Costs of jumps are those of DDIM without noise, so that
               the other two objectives take no eta above 0.
    on_kept    told how many evaluations an earlier search left; they count in `network_evaluations` all the same.

    A quantized and accelerated pipeline is searched in its integers; the result fits its full-precision original too.
    Image k's noise depends on seed + k alone, in a stream of its own: a trajectory is never judged by the images it was
    searched on. Work is kept in `workdir` (default: Octavo's cache): a killed search goes on after its last batch or
    Frechet distance, and another number of steps by dp costs nothing. `search_cost` tells the cost before.

    Raises `OctavoError` for what cannot be searched: steps or a seed out of range, an unknown method, an objective that
    the method cannot minimise, an eta that is not DDIM's or that the objective knows nothing of, a scheduler that takes
    no timesteps of one's choice, inputs with which the pipeline leaves out timesteps (image-to-image).

    >>> trajectory = search_trajectory(pipeline, 10)  # doctest: +SKIP
    >>> octavo.with_trajectory(pipeline, trajectory)(num_inference_steps=10)  # doctest: +SKIP
    """
    options = options or SearchOptions()
    objective = chosen_objective(method, objective)
    known = target is None or not target.of_model
    cost = search_cost(pipeline.scheduler, steps, method, objective, options, known, batch_size)
    check_search_seed(seed, method, objective, options, batch_size)
    pipeline, eta, inputs = with_own_eta(pipeline, objective, eta, inputs)
    schedule = noise_schedule(pipeline.scheduler)
    identity = model_identity(find_denoiser(pipeline)[1])
    check_fits(pipeline, _trajectory(schedule, (0,), "dp", model=identity))
    if method not in SEARCHES:
        return replace(spaced(pipeline.scheduler, method, steps), eta=eta)
    check_visits_all(pipeline, inputs, BY_FORMULA)
    if objective == "fd" and target is None:
        raise OctavoError("target: is needed for the objective fd: features, and statistics of real data")
    search = _Search(pipeline, schedule, options, seed, batch_size, inputs, workdir, progress, on_kept)
    facts: dict[str, Any] = {"solver": type(pipeline.scheduler).__name__, "runtime": executed(pipeline)[0]}
    if method == "dp":
        costs = search.costs(str(objective), method)
        found, values = costs.cheapest(steps)
        timesteps, facts = found[-1], {**facts, "cost": values[-1], "candidates": len(costs.candidates)}
    elif method == "grid":
        timesteps, cost, more = _on_grid(search, steps, str(objective), target)
        facts |= more
    else:
        assert target is not None
        timesteps, cost, more = _by_descent(search, steps, target)
        facts |= more
    if objective == "fd" and target is not None and target.of_model:
        cost += cost_of_reference(pipeline.scheduler, options, batch_size)
    return _trajectory(
        schedule, timesteps, method, objective, model=identity, cost=cost, seed=seed, facts=facts, eta=eta
    )


def _trajectory(
    schedule: NoiseSchedule,
    timesteps: tuple[int, ...],
    method: str,
    objective: str | None = None,
    *,
    model: str,
    cost: int = 0,
    seed: int | None = None,
    facts: Mapping[str, Any] | None = None,
    eta: float | None = None,
) -> Trajectory:
    return Trajectory(
        timesteps,
        schedule.num_train_timesteps,
        schedule.prediction_type,
        method,
        objective,
        cost,
        seed,
        model,
        facts or {},
        schedule.digest,
        eta,
    )


@dataclass
class _Search:
    pipeline: DiffusionPipeline
    schedule: NoiseSchedule
    options: SearchOptions
    seed: int
    batch_size: int
    inputs: Mapping[str, Any] | None
    workdir: str | os.PathLike[str] | None
    progress: bool
    on_kept: Callable[[int], Any]

    @property
    def lowest(self) -> int:
        return lowest_timestep(self.pipeline.scheduler)

    def costs(self, objective: str, method: str) -> JumpCosts:
        runtime, networks = executed(self.pipeline)
        quiet = held_eta(self.pipeline.scheduler) is not None
        return measure_jump_costs(
            with_eta(self.pipeline, 0.0) if quiet else self.pipeline,  # one table for every eta
            objective,
            candidates=candidate_timesteps(self.schedule, self.options, method, self.lowest),
            images=self.options.images,
            seed=self.seed,
            batch_size=self.batch_size,
            inputs=self.inputs,
            workdir=self.workdir,
            networks=networks,
            runtime=runtime,
            progress=self.progress,
            on_kept=self.on_kept,
        )

    def folder(self, target: Target) -> Path:
        """Where Frechet distances are kept, by the name of all that decides them but the timesteps."""
        runtime, networks = executed(self.pipeline)
        decisions = ["fd", FORMAT, self.options.fd_images, self.seed, self.batch_size, target.name]
        decisions += [runtime, list(versions(*LIBRARIES).values()), torch.get_num_threads()]
        name = pipeline_fingerprint(self.pipeline, decisions, self.inputs, networks)
        return (Path(self.workdir) if self.workdir else cache_folder() / "trajectories") / name

    def statistics(self, target: Target) -> FeatureStatistics:
        """The target's own, or those of the model's images in many steps, from other noise than a search's."""
        if target.statistics is not None:
            return target.statistics
        made: list[int] = []
        store = generate_shards(
            without_trajectory(self.pipeline),
            self.options.fd_images,
            steps=min(REFERENCE_STEPS, self.schedule.num_train_timesteps),
            seed=self.seed + SEED_STREAM + REFERENCE_STREAM,
            batch_size=self.batch_size,
            inputs=self.inputs,
            progress=self.progress,
            label="sample reference",
            on_images=made.append,
        )
        left = 1 - sum(made) / whole_batches(self.options.fd_images, self.batch_size)
        self.on_kept(round(left * cost_of_reference(self.pipeline.scheduler, self.options, self.batch_size)))
        return FeatureStatistics.of(extract(target.extractor, to_uint8(store.images())).pooled)


def _on_grid(
    search: _Search, steps: int, objective: str, target: Target | None
) -> tuple[tuple[int, ...], int, dict[str, Any]]:
    """The timesteps, the evaluations of the network, and what else is worth telling."""
    options = search.options
    grid = noise_grid(search.schedule, options.mantissas, search.lowest)
    costs = search.costs("trajectory" if objective == "fd" else objective, "grid")
    ranked = cheapest_on_grid(costs, grid, steps, options.finalists if objective == "fd" else 1)
    facts: dict[str, Any] = {"grid": list(grid), "tried": ranked.tried, "cost": ranked.costs[0]}
    if objective != "fd":
        return ranked.timesteps[0], costs.network_evaluations, facts
    assert target is not None
    with _scored(search, target, steps, len(ranked.timesteps)) as score:
        scores = {timesteps: score(timesteps) for timesteps in ranked.timesteps}
    best = min(scores, key=lambda timesteps: scores[timesteps])
    facts = {
        **facts,
        "cost": scores[best],
        "finalists": len(scores),
        "screened_by": "trajectory cost, a heuristic",
        "rank_by_it": 1 + ranked.timesteps.index(best),
    }
    return best, costs.network_evaluations + score.network_evaluations, facts


def _by_descent(search: _Search, steps: int, target: Target) -> tuple[tuple[int, ...], int, dict[str, Any]]:
    names: dict[str, tuple[int, ...]] = {}
    evaluations = 0
    for objective in OBJECTIVES:
        costs = search.costs(objective, "dp")
        names[f"dp {objective}"] = costs.cheapest(steps)[0][-1]
        evaluations += costs.network_evaluations
    scheduler = search.pipeline.scheduler
    names |= {name: spaced(scheduler, name, steps).timesteps for name in descent_starts()}
    with _scored(search, target, steps, search.options.max_scores) as score:
        found = descend(
            score,
            list(names.values()),
            search.schedule.num_train_timesteps,
            max_scores=search.options.max_scores,
            lowest=search.lowest,
        )
    facts = {
        "cost": found.score,
        "scores": len(found.scores),
        "starts": {name: found.scores[timesteps] for name, timesteps in names.items()},
    }
    return found.timesteps, evaluations + score.network_evaluations, facts


@contextmanager
def _scored(search: _Search, target: Target, steps: int, scores: int) -> Iterator[FrechetScore]:
    """A score whose folder is held, with a progress bar over the images of as many scores as there may be to make."""
    folder = search.folder(target)
    folder.mkdir(parents=True, exist_ok=True)
    evaluations = evaluations_on(search.pipeline.scheduler, steps)
    with held(folder, f"{folder}: another process measures the same; wait for it"):
        statistics = search.statistics(target)
        total = scores * search.options.fd_images
        with tqdm(total=total, desc=f"FD, {steps} steps", unit="image", disable=not search.progress) as bar:

            def on_kept(images: int) -> None:
                bar.total -= images
                bar.refresh()
                search.on_kept(images * evaluations)

            yield FrechetScore(
                search.pipeline,
                target.extractor,
                statistics,
                images=search.options.fd_images,
                seed=search.seed,
                batch_size=search.batch_size,
                inputs=search.inputs,
                folder=folder,
                on_images=bar.update,
                on_kept=on_kept,
            )

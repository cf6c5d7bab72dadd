"""What all jumps between candidate timesteps cost on one model: measured by batches, kept for any number of steps."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import nn
from tqdm import tqdm

from octavo.diffusion.denoiser import find_denoiser
from octavo.diffusion.generators import check_seed, generators
from octavo.diffusion.trajectories.dynamic_programming import Paths, cheapest_paths, path_cost
from octavo.diffusion.trajectories.elbo import ElboErrors, elbo_jumps, measure_elbo
from octavo.diffusion.trajectories.own_images import own_images
from octavo.diffusion.trajectories.reference import ReferenceErrors, measure_reference, reference_jumps
from octavo.diffusion.trajectories.schedule import Floats, NoiseSchedule, noise_schedule
from octavo.diffusion.trajectories.spacings import evenly
from octavo.diffusion.trajectories.trajectory import check_timesteps
from octavo.errors import OctavoError
from octavo.files import atomic_path, cache_folder
from octavo.fingerprint import pipeline_fingerprint, versions
from octavo.work import held

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


logger = logging.getLogger(__name__)

FORMAT = 2
"""Raised when a change of how costs are measured makes stored ones stale."""
OBJECTIVES = ("elbo", "trajectory")
"""What is a sum over jumps."""
SEED_STREAM = 3 << 30
"""Added to the seeds of a search's images, so that no trajectory is judged by the images it was searched on."""
IMAGE_STEPS = 50
"""Steps in which the model makes the images that the ELBO is measured on."""
CANDIDATES = 100
FINE_WHILE_CLIPPED = 200
"""Candidates up to which DDIM over all of them is a good reference if it clips x_0; see `measure_jump_costs`."""
LIBRARIES = ("octavo", "torch", "diffusers", "numpy")

Errors = ElboErrors | ReferenceErrors


@dataclass(frozen=True, eq=False)
class JumpCosts:
    """What every jump between N candidate timesteps costs, of one objective on one model.

    candidates           ascending timesteps; node 1 + i is candidates[i], node 0 the image.
    jumps, start         see `cheapest_paths`: float64 [N + 1, N + 1] and [N].
    objective            "elbo" (nats per image) or "trajectory" (mean squared error of the image, predicted).
    network_evaluations  what measuring cost: evaluations of the network, one for each image.
    """

    candidates: tuple[int, ...]
    jumps: Floats
    start: Floats
    objective: str
    network_evaluations: int

    def cheapest(self, max_steps: int) -> tuple[tuple[tuple[int, ...], ...], tuple[float, ...]]:
        """The cheapest timesteps, descending, of each number of steps 1 .. max_steps, and what they cost."""
        paths: Paths = cheapest_paths(self.jumps, max_steps, self.start)
        return tuple(tuple(self.candidates[n - 1] for n in nodes) for nodes in paths.nodes), paths.costs

    def cost(self, timesteps: Sequence[int]) -> float:
        """What a trajectory costs. Raises `OctavoError` for a timestep that is no candidate.

        >>> costs = JumpCosts((0, 500), np.array([[0, 1.0, 4], [0, 0, 2], [0, 0, 0]]), np.zeros(2), "elbo", 0)
        >>> costs.cost((500, 0)), costs.cheapest(2)
        (3.0, (((0,), (500, 0)), (1.0, 3.0)))
        """
        nodes = {t: 1 + i for i, t in enumerate(self.candidates)}
        for t in timesteps:
            if t not in nodes:
                raise OctavoError(f"timesteps: {t} is not one of the {len(nodes)} candidates")
        return path_cost(self.jumps, tuple(nodes[t] for t in timesteps), self.start)


def cost_of_measuring(
    objective: str, num_candidates: int, images: int, num_train_timesteps: int = 1000
) -> int:
    """Evaluations of the network, one for each image, that `measure_jump_costs` takes.

    >>> cost_of_measuring("trajectory", 100, 64), cost_of_measuring("elbo", 100, 64)
    (6400, 9664)
    """
    check_objective(objective)
    own = 0 if objective == "trajectory" else min(IMAGE_STEPS, num_train_timesteps) + 1
    return images * (own + num_candidates)


def check_objective(objective: str) -> None:
    """Raise `OctavoError` unless the objective is a sum over jumps."""
    if objective not in OBJECTIVES:
        raise OctavoError(
            f"objective: {objective!r} is no sum over jumps; dynamic programming takes {' or '.join(OBJECTIVES)}"
        )


def measure_jump_costs(
    pipeline: DiffusionPipeline,
    objective: str,
    *,
    candidates: int | Sequence[int] | None = None,
    images: int = 64,
    seed: int = 0,
    batch_size: int = 16,
    inputs: Mapping[str, Any] | None = None,
    workdir: str | os.PathLike[str] | None = None,
    networks: Mapping[str, nn.Module] | None = None,
    runtime: Sequence[Any] = (),
    progress: bool = True,
    on_kept: Callable[[int], Any] = lambda evaluations: None,
) -> JumpCosts:
    """Measure what jumps between candidate timesteps cost on this model; `objective` is one of `OBJECTIVES`.

    elbo        on images that the model makes itself in 50 steps: see `elbo_jumps`.
    trajectory  against DDIM (eta = 0) over all candidates, the image that the model would make: see `reference_jumps`.

    Both clip predicted images where the pipeline's own scheduler does. DDIM that clips x_0 and keeps eps has no limit:
    the shorter its steps, the more often the state is moved. So where it clips, more candidates than FINE_WHILE_CLIPPED
    are a worse reference (of the bundled model 0.03 from the flow at 200 steps, 0.3 at 1,000), and are warned of.

    Image k's noise depends on seed + k alone; sums over images are taken in order of their batches. What is measured
    stays in `workdir` (default: Octavo's cache) under the name of all that decides it: a killed run goes on after the
    last whole batch, and another number of steps costs nothing.

    candidates  the timesteps, ascending, or how many, evenly spaced; None: 100, or all of a shorter schedule.
    networks    component -> the network that executes in its place, whose contents then name the work.
    runtime     what else decides what they compute, JSON-safe (the engine, its precision).
    on_kept     told how many evaluations an earlier search left, which are not made again.

    Raises `OctavoError` for another objective, counts or a seed out of range, a scheduler without alpha-bars, or while
    another process measures the same.
    """
    check_objective(objective)
    schedule = noise_schedule(pipeline.scheduler)
    check_count("images", images, 2)
    check_count("batch_size", batch_size, 1)
    check_seed(seed, SEED_STREAM, images)
    timesteps = chosen_candidates(candidates, schedule.num_train_timesteps)
    if objective == "trajectory" and schedule.clip is not None and len(timesteps) > FINE_WHILE_CLIPPED:
        logger.warning(
            "candidates: %d are more than %d, and the sampler clips predicted images: so fine a reference is a worse "
            "one; give fewer",
            len(timesteps),
            FINE_WHILE_CLIPPED,
        )
    decisions = [FORMAT, objective, list(timesteps), images, seed, batch_size, IMAGE_STEPS, *runtime]
    decisions += [list(versions(*LIBRARIES).values()), torch.get_num_threads()]
    name = pipeline_fingerprint(pipeline, decisions, inputs, networks)
    folder = (Path(workdir) if workdir else cache_folder() / "trajectories") / name
    folder.mkdir(parents=True, exist_ok=True)
    rounds = cost_of_measuring(objective, len(timesteps), 1, schedule.num_train_timesteps)
    total: Errors | None = None
    batches = [
        (first, min(batch_size, images - first), folder / f"errors-{first:06d}.safetensors")
        for first in range(0, images, batch_size)
    ]
    told: dict[str, Any] = {"desc": f"measure {objective}", "unit": "evaluation", "disable": not progress}
    with held(folder, f"{folder}: another process measures the same; wait for it"):
        kept = rounds * sum(count for _, count, path in batches if path.is_file())
        on_kept(kept)
        with tqdm(total=images * rounds, initial=kept, **told) as bar:
            for first, count, path in batches:
                if path.is_file():
                    errors = _load(path, objective, len(timesteps))
                else:
                    errors = _measure(
                        pipeline, schedule, objective, timesteps, seed, first, count, inputs, bar.update
                    )
                    _save(path, errors)
                total = errors if total is None else total + errors  # type: ignore[operator]
    jumps, start = _costs(total, schedule, timesteps)
    if not (np.isfinite(jumps[np.triu_indices_from(jumps, 1)]).all() and np.isfinite(start).all()):
        raise OctavoError(
            f"{find_denoiser(pipeline)[0]}: its predictions are not finite at some of the timesteps, so that nothing "
            "can be searched"
        )
    return JumpCosts(timesteps, jumps, start, objective, images * rounds)


def chosen_candidates(given: int | Sequence[int] | None, num_train_timesteps: int) -> tuple[int, ...]:
    """Ascending timesteps: those given, or as many as given, evenly spaced; None: CANDIDATES, or all of fewer."""
    if given is None:
        given = min(CANDIDATES, num_train_timesteps)
    if not isinstance(given, int):
        check_timesteps(list(given)[::-1], num_train_timesteps)
        check_count("candidates", len(given), 2)
        return tuple(given)
    check_count("candidates", given, 2, num_train_timesteps)
    return evenly(num_train_timesteps, given)


def _measure(
    pipeline: DiffusionPipeline,
    schedule: NoiseSchedule,
    objective: str,
    timesteps: tuple[int, ...],
    seed: int,
    first: int,
    count: int,
    inputs: Mapping[str, Any] | None,
    on_images: Callable[[int], Any],
) -> Errors:
    own = generators(seed + SEED_STREAM, first, count)
    where: dict[str, Any] = {"generators": own, "inputs": inputs, "first_image": first}
    if objective == "trajectory":
        return measure_reference(
            pipeline, schedule, timesteps, on_evaluation=lambda: on_images(count), **where
        )
    made = own_images(pipeline, schedule, steps=IMAGE_STEPS, **where)
    on_images(count * min(IMAGE_STEPS, schedule.num_train_timesteps))
    return measure_elbo(pipeline, schedule, timesteps, made, on_evaluation=lambda: on_images(count), **where)


def _costs(
    total: Errors | None, schedule: NoiseSchedule, timesteps: tuple[int, ...]
) -> tuple[Floats, Floats]:
    if isinstance(total, ElboErrors):
        return elbo_jumps(total, schedule, timesteps)
    assert total is not None
    return reference_jumps(total, schedule, timesteps)


def _save(path: Path, errors: Errors) -> None:
    tensors = {name: np.asarray(value, dtype=np.float64) for name, value in vars(errors).items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)


def _load(path: Path, objective: str, num_candidates: int) -> Errors:
    try:
        stored = load_file(path)
        images, dims = (int(stored[name]) for name in ("images", "dims"))
        if objective == "elbo":
            shape = stored["errors"].shape
            if shape != (num_candidates,):
                raise ValueError(shape)
            return ElboErrors(stored["errors"], float(stored["norm"]), images, dims)
        shapes = stored["jumps"].shape, stored["start"].shape
        if shapes != ((num_candidates + 1,) * 2, (num_candidates,)):
            raise ValueError(shapes)
        first, second = (float(moment) for moment in stored["moments"])
        return ReferenceErrors(stored["jumps"], stored["start"], (first, second), images, dims)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise OctavoError(f"{path}: not readable as measured errors; delete it and start again") from error


def check_count(name: str, value: int, low: int, high: int = 2**31) -> None:
    """Raise `OctavoError` unless low <= value <= high."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise OctavoError(f"{name}: {value!r} is not a whole number from {low} to {high}")

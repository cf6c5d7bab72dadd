"""By which methods a trajectory can be searched, for which objectives, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from octavo.diffusion.generators import check_seed
from octavo.diffusion.solvers.eta import checked_eta
from octavo.diffusion.trajectories import noise_schedule
from octavo.diffusion.trajectories.bound import free_scheduler
from octavo.diffusion.trajectories.eta import held_eta, with_eta
from octavo.diffusion.trajectories.grid import MANTISSAS, check_grid, noise_grid
from octavo.diffusion.trajectories.jump_costs import (
    CANDIDATES,
    OBJECTIVES,
    SEED_STREAM,
    check_count,
    check_objective,
    cost_of_measuring,
)
from octavo.diffusion.trajectories.schedule import NoiseSchedule
from octavo.diffusion.trajectories.schedulers import lowest_timestep
from octavo.diffusion.trajectories.spacings import SPACINGS, check_steps, evenly
from octavo.diffusion.trajectories.use import check_visits, evaluations_of, on_timesteps
from octavo.errors import OctavoError
from octavo.evaluation.generate import check_counts, whole_batches

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SEARCHES = {"dp": ("trajectory", "elbo"), "grid": ("trajectory", "elbo", "fd"), "descent": ("fd",)}
"""Method -> the objectives that it can minimise; the first is the one it takes unless told."""
METHODS = (*SEARCHES, *SPACINGS)
STARTS = ("leading", "trailing", "linspace", "quadratic", "karras", "beta")
"""The spacings that a descent starts from, besides what dynamic programming finds; see `descent_starts`."""
REFERENCE_STEPS = 100
"""Steps of the images that FD is taken to where no real ones are at hand."""
REFERENCE_STREAM = 1 << 28
"""Added to the seeds of those images, besides SEED_STREAM."""


@dataclass(frozen=True)
class SearchOptions:
    """What a search may cost.

    candidates  timesteps, evenly spaced, that costs of jumps are measured between; None: 100, or all of a shorter
                schedule.
    images      images that these costs are means over.
    fd_images   images of each Frechet distance.
    finalists   how many trajectories of a grid have their Frechet distance measured.
    max_scores  Frechet distances that a descent may take, at least one for each of its starts.
    mantissas   of the grid's noise levels.
    """

    candidates: int | None = None
    images: int = 64
    fd_images: int = 512
    finalists: int = 32
    max_scores: int = 80
    mantissas: tuple[float, ...] = MANTISSAS

    def __post_init__(self) -> None:
        check_counts(finalists=self.finalists, max_scores=self.max_scores)
        for name, least in (("candidates", 2), ("images", 2), ("fd_images", 8)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise OctavoError(f"{name}: {value} is not at least {least}")


def chosen_objective(method: str, objective: str | None) -> str | None:
    """The objective that `method` minimises: the one given, or its first; None for a spacing.

    Raises `OctavoError` for an unknown method, or an objective that it cannot minimise.

    >>> chosen_objective("dp", None), chosen_objective("karras", None)
    ('trajectory', None)
    """
    if method not in METHODS:
        raise OctavoError(f"method: {method!r} is not one of {', '.join(METHODS)}")
    if method not in SEARCHES:
        if objective is not None:
            raise OctavoError(f"objective: {method} is a spacing and minimises nothing; leave it out")
        return None
    if objective is None:
        return SEARCHES[method][0]
    if objective not in (*OBJECTIVES, "fd"):
        raise OctavoError(f"objective: {objective!r} is not one of {', '.join((*OBJECTIVES, 'fd'))}")
    if objective not in SEARCHES[method]:
        if method == "dp":
            check_objective(objective)
        raise OctavoError(f"objective: descent is for fd; dp finds the optimum of {objective}")
    return objective


def check_eta(objective: str | None, eta: Any) -> None:
    """Raise `OctavoError` for an eta out of range, or above 0 where costs of jumps are minimised, which know of none.

    >>> check_eta("fd", 0.5)
    """
    if checked_eta("eta", eta) and objective in OBJECTIVES:
        raise OctavoError(
            f"eta: the costs that objective {objective} adds up are of DDIM without noise; take the objective fd (by "
            "descent or grid), or a spacing"
        )


def with_own_eta(
    pipeline: DiffusionPipeline, objective: str | None, eta: float | None, inputs: Mapping[str, Any] | None
) -> tuple[DiffusionPipeline, float | None, dict[str, Any]]:
    """The pipeline with the eta given, by name or among the inputs; the eta that a trajectory keeps; the other inputs.

    Where costs of jumps are minimised that is the pipeline without the eta that it holds, and none.
    """
    others = dict(inputs or {})
    among = others.pop("eta", None)
    given = among if eta is None else eta
    if eta is not None and among not in (None, eta):
        raise OctavoError(f"eta: {eta}, but the inputs have {among}; leave one out")
    if given is not None:
        check_eta(objective, given)
        return with_eta(pipeline, given), float(given), others
    own = held_eta(pipeline.scheduler)
    if own is not None and objective in OBJECTIVES:
        return with_eta(pipeline, 0.0), None, others
    return pipeline, own, others


def search_cost(
    scheduler: Any,
    steps: int,
    method: str,
    objective: str | None,
    options: SearchOptions,
    target: bool = True,
    batch_size: int = 16,
) -> int:
    """Evaluations of the network, one for each image, that a search takes at most. `target`: real data are at hand.

    Of solvers that evaluate more than once a step (Heun, predictor-corrector) each evaluation counts. The images that
    stand in for real data are made in whole batches.

    Raises `OctavoError` as the search itself would: for a number of steps, a method, an objective or a scheduler that
    cannot be.

    >>> from diffusers import DDIMScheduler
    >>> search_cost(DDIMScheduler(), 5, "dp", "trajectory", SearchOptions())
    6400
    """
    objective = chosen_objective(method, objective)
    check_visits(scheduler)
    schedule = noise_schedule(scheduler)
    total, lowest = schedule.num_train_timesteps, lowest_timestep(scheduler)
    check_steps(steps, total - lowest)
    if method not in SEARCHES:
        return 0
    count = len(candidate_timesteps(schedule, options, method, lowest))
    if method == "grid":
        check_grid(noise_grid(schedule, options.mantissas, lowest), steps)
    elif steps > count:
        raise OctavoError(f"steps: {steps} is more than the {count} candidate timesteps; give more of these")
    if method == "descent" and options.max_scores < (starts := len(descent_starts()) + len(OBJECTIVES)):
        raise OctavoError(
            f"max_scores: {options.max_scores} are fewer than the {starts} trajectories that a descent starts from"
        )
    needed = OBJECTIVES if method == "descent" else ("trajectory",) if objective == "fd" else (objective,)
    cost = sum(cost_of_measuring(str(each), count, options.images, total) for each in needed)
    if objective == "fd":
        scores = options.max_scores if method == "descent" else options.finalists
        cost += scores * options.fd_images * evaluations_on(scheduler, steps)
        cost += 0 if target else cost_of_reference(scheduler, options, batch_size)
    return cost


def evaluations_on(scheduler: Any, steps: int) -> int:
    """Evaluations of the network that an image takes on any trajectory of so many timesteps, in the scheduler's solver.

    >>> from octavo import PredictorCorrectorScheduler
    >>> evaluations_on(PredictorCorrectorScheduler(), 5)
    9
    """
    lowest = lowest_timestep(scheduler)
    return evaluations_of(on_timesteps(scheduler, range(lowest + steps - 1, lowest - 1, -1)), steps)


def cost_of_reference(scheduler: Any, options: SearchOptions, batch_size: int) -> int:
    """Evaluations of the network, one for each image, of the model's own images that FD is taken to."""
    steps = min(REFERENCE_STEPS, noise_schedule(scheduler).num_train_timesteps)
    return whole_batches(options.fd_images, batch_size) * evaluations_of(free_scheduler(scheduler), steps)


def check_search_seed(
    seed: int, method: str, objective: str | None, options: SearchOptions, batch_size: int = 16
) -> None:
    """Raise `OctavoError` for a seed that the seeds of some image of the search would be out of range with.

    >>> check_search_seed(1_000_000_000, "descent", "fd", SearchOptions())
    Traceback (most recent call last):
        ...
    octavo.errors.OctavoError: seed: 1000000000 is not a whole number from 0 to 805305856
    """
    if method in SEARCHES:
        stream = SEED_STREAM + (REFERENCE_STREAM if objective == "fd" else 0)
        most = whole_batches(options.fd_images, batch_size) if objective == "fd" else 0
        check_seed(seed, stream, max(options.images, most))


def descent_starts() -> tuple[str, ...]:
    """STARTS, without "beta" where scipy is not at hand, which it needs."""
    return tuple(name for name in STARTS if name != "beta" or find_spec("scipy") is not None)


def candidate_timesteps(
    schedule: NoiseSchedule, options: SearchOptions, method: str, lowest: int = 0
) -> tuple[int, ...]:
    """What jumps are measured between, ascending: evenly spaced, the grid among them where that is searched.

    Raises `OctavoError` for more than the schedule has.
    """
    most = schedule.num_train_timesteps - lowest
    count = min(CANDIDATES, most) if options.candidates is None else options.candidates
    check_count("candidates", count, 2, most)
    even = evenly(schedule.num_train_timesteps, count, lowest)
    if method != "grid":
        return even
    return tuple(sorted({*even, *noise_grid(schedule, options.mantissas, lowest)}))

"""What `octavo tune` tries on a pipeline, before anything is made: choices, their evaluations, what is left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import diffusers

from octavo.diffusion import probe
from octavo.diffusion.samplers import ADAPTIVE, SOLVERS, solver_name, split_eta, with_scheduler
from octavo.diffusion.trajectories import Trajectory, noise_schedule, spaced, with_trajectory
from octavo.diffusion.trajectories.bound import plain_name
from octavo.diffusion.trajectories.eta import held_eta
from octavo.diffusion.trajectories.schedulers import lowest_timestep
from octavo.diffusion.trajectories.use import check_visits
from octavo.errors import OctavoError
from octavo.evaluation.trajectory_methods import candidate_timesteps
from octavo.study.tune_networks import DP
from octavo.study.tune_options import TuneOptions

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

ADDS_NOISE = (
    "AnalyticScheduler",
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "LCMScheduler",
    "PredictorCorrectorScheduler",
    "TCDScheduler",
)


@dataclass(frozen=True)
class Plan:
    """What fits the pipeline.

    evaluations  (solver, spacing) -> steps, ascending -> evaluations of the network that an image takes.
    left_out     what does not fit, and why, a line each.
    """

    evaluations: Mapping[tuple[str, str], Mapping[int, int]]
    left_out: tuple[str, ...]


def make_plan(
    pipeline: DiffusionPipeline, options: TuneOptions, inputs: Mapping[str, Any] | None = None
) -> Plan:
    """Try every solver, spacing and number of steps on the schedulers alone; the network is not evaluated.

    Raises `OctavoError` for a solver that does not exist, numbers of steps that the schedule does not have, inputs
    that do not fit, and where nothing fits, with the reasons.
    """
    total = noise_schedule(pipeline.scheduler).num_train_timesteps
    if options.reference_steps > total:
        raise OctavoError(
            f"reference_steps: {options.reference_steps} is more than the {total} timesteps of the schedule"
        )
    probe(
        pipeline, num_inference_steps=options.reference_steps, inputs=inputs
    )  # inputs that do not fit are told
    for name in options.solvers:
        _check_exists(pipeline, name)
    if beyond := [steps for steps in options.steps if not 1 <= steps <= total]:
        raise OctavoError(f"steps: {beyond[0]} is not a number of steps from 1 to the schedule's {total}")
    evaluations: dict[tuple[str, str], dict[int, int]] = {}
    left_out: list[str] = []
    for solver in dict.fromkeys(options.solvers):
        try:
            sampler = with_scheduler(pipeline, solver)
            check_visits(sampler.scheduler)
            if options.metric == "psnr" and adds_noise(sampler.scheduler, inputs):
                raise OctavoError("adds noise on its way, so that psnr compares images of different noise")
        except OctavoError as error:
            left_out.append(f"{solver}: {error}")
            continue
        counted: dict[int, int] = {}
        for spacing in dict.fromkeys(options.spacings):
            reasons: dict[str, list[int]] = {}
            fitting: dict[int, int] = {}
            for steps in sorted(set(options.steps)):
                try:
                    placed = with_trajectory(sampler, _stand_in(sampler, spacing, steps, options))
                    placed.scheduler.set_timesteps(steps)
                    if steps not in counted:  # a solver may evaluate more often than it is told (Heun)
                        counted[steps] = probe(placed, num_inference_steps=steps, inputs=inputs).num_steps
                except OctavoError as error:
                    reasons.setdefault(str(error), []).append(steps)
                    continue
                fitting[steps] = counted[steps]
            left_out += [
                f"{solver}, {spacing}, {' '.join(map(str, steps))} steps: {reason}"
                for reason, steps in reasons.items()
            ]
            if fitting:
                evaluations[solver, spacing] = fitting
    if not evaluations:
        raise OctavoError(f"solvers, spacings, steps: nothing of it can be tried ({'; '.join(left_out[:3])})")
    return Plan(evaluations, tuple(left_out))


def adds_noise(scheduler: Any, inputs: Mapping[str, Any] | None = None) -> bool:
    """Whether the sampler draws noise after the first, so that its images are not decided by x_T alone.

    >>> adds_noise(diffusers.DDPMScheduler()), adds_noise(diffusers.DDIMScheduler(), {"eta": 0.0})
    (True, False)
    """
    name = plain_name(scheduler).replace("Unconditional", "")
    by_eta = name.startswith("DDIM") and bool((inputs or {}).get("eta", held_eta(scheduler)))
    return by_eta or name in ADDS_NOISE or str(scheduler.config.get("algorithm_type")).startswith("sde")


def _stand_in(sampler: DiffusionPipeline, spacing: str, steps: int, options: TuneOptions) -> Trajectory:
    """The spacing's timesteps; for those that are yet to be searched, as many others."""
    if spacing != DP:
        return spaced(sampler.scheduler, spacing, steps)
    lowest = lowest_timestep(sampler.scheduler)
    count = len(candidate_timesteps(noise_schedule(sampler.scheduler), options.search, DP, lowest))
    if steps > count:
        raise OctavoError(f"steps: more than the {count} candidate timesteps of the search")
    return spaced(sampler.scheduler, "trailing", steps)


def _check_exists(pipeline: DiffusionPipeline, name: str) -> None:
    if solver_name(name) in ADAPTIVE:
        raise OctavoError(
            f"solvers: {name} makes as many evaluations as each image takes, so that there is no number of steps to "
            "choose (docs/trajectories.md has what it costs); leave it out, or take octavo sample --scheduler"
        )
    try:
        solver, _ = split_eta(name)
        if solver_name(solver) in SOLVERS or (solver.endswith("Scheduler") and hasattr(diffusers, solver)):
            return
        with_scheduler(pipeline, name)
    except OctavoError as error:
        raise OctavoError(str(error).replace("scheduler:", "solvers:", 1)) from error

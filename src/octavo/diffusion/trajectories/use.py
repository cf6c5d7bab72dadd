"""Put a trajectory under a pipeline: its own solver, on the timesteps given."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from octavo.diffusion.denoiser import find_denoiser
from octavo.diffusion.exchange import exchange_scheduler
from octavo.diffusion.samplers import SOLVERS
from octavo.diffusion.trajectories.bound import SETTING, free_scheduler, plain_config, plain_name, visited_by
from octavo.diffusion.trajectories.eta import held_eta, with_eta
from octavo.diffusion.trajectories.schedule import check_schedule, noise_schedule
from octavo.diffusion.trajectories.schedulers import ADAPTERS, OWN_ADAPTERS, OWN_NOISE_LEVELS
from octavo.diffusion.trajectories.trajectory import Trajectory
from octavo.errors import OctavoError
from octavo.fingerprint import model_identity, same_model

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def with_trajectory(pipeline: DiffusionPipeline, trajectory: Trajectory) -> DiffusionPipeline:
    """The same pipeline whose scheduler visits `trajectory`: same class, same networks, same solver and settings.

    Call it with `num_inference_steps=trajectory.num_steps`; any other count is refused. `save_pretrained` writes an
    ordinary folder, which plain `from_pretrained` loads after `import octavo`. `pipeline` stays as it was; a trajectory
    that it already had is replaced, and so is its eta if the trajectory has one. A quantized network takes what was
    found on its full-precision original, and the other way round.

    Raises `OctavoError` for a scheduler that cannot visit timesteps of one's choice, one of another prediction type,
    number of training timesteps or noise schedule, a trajectory made for another model, one with an eta above 0 for
    another solver than DDIM, and one that ends at timestep 0 under DEIS, which jumps there itself.

    >>> with_trajectory(pipeline, Trajectory((999, 400, 100), 1000, "epsilon", "by hand"))  # doctest: +SKIP
    """
    check_fits(pipeline, trajectory)
    if trajectory.eta is not None:
        pipeline = with_eta(pipeline, trajectory.eta)
    return exchange_scheduler(pipeline, on_timesteps(pipeline.scheduler, trajectory.timesteps))


def on_timesteps(scheduler: Any, timesteps: Sequence[int]) -> Any:
    """The solver of `scheduler`, which stays as it was, on these timesteps; for one that `check_visits` lets pass."""
    adapter = {**ADAPTERS, **OWN_ADAPTERS}[plain_name(scheduler)]
    config = plain_config(scheduler)
    settings = {
        name: given for name, given in OWN_NOISE_LEVELS.items() if config.get(name) not in (None, given)
    }
    return adapter.from_config(
        {**config, **settings, "_class_name": adapter.__name__, SETTING: list(timesteps)}
    )


def evaluations_of(scheduler: Any, steps: int) -> int:
    """Evaluations of the network that one image takes in a run of `steps` steps: 2 K - 1 under Heun.

    >>> from octavo import DDIMEtaScheduler, PredictorCorrectorScheduler
    >>> evaluations_of(DDIMEtaScheduler(), 5), evaluations_of(PredictorCorrectorScheduler(), 5)
    (5, 9)
    """
    own = copy.deepcopy(scheduler)
    own.set_timesteps(steps)
    return len(own.timesteps)


def check_fits(pipeline: DiffusionPipeline, trajectory: Trajectory) -> None:
    """Raise `OctavoError` unless the pipeline's scheduler and network can go by `trajectory`; see `with_trajectory`."""
    check_visits(pipeline.scheduler)
    name = plain_name(pipeline.scheduler)
    if trajectory.eta and held_eta(pipeline.scheduler) is None and name != "DDIMScheduler":
        raise OctavoError(
            f"trajectory: was made with an eta of {trajectory.eta:g}, DDIM's, which {name} has not; sample it by ddim, "
            f"or search one for {name}"
        )
    check_schedule(pipeline.scheduler, trajectory, "trajectory", "search one for this model")
    component, denoiser = find_denoiser(pipeline)
    if trajectory.model is not None and not same_model(trajectory.model, model_identity(denoiser)):
        raise OctavoError(
            f"trajectory: was made for another model, not for this {component} or a version of it in other bits; "
            "search one for this model"
        )


def check_visits(scheduler: Any) -> None:
    """Raise `OctavoError` unless the scheduler is of a kind that can visit timesteps of one's choice."""
    noise_schedule(scheduler)
    name = plain_name(scheduler)
    if name not in {**ADAPTERS, **OWN_ADAPTERS}:
        able = [solver for solver, (kind, _) in SOLVERS.items() if kind in ADAPTERS]
        raise OctavoError(
            f"scheduler: {name.replace('Unconditional', '')} takes no timesteps of one's choice; {', '.join(able)} do"
        )


def steps_of(pipeline: DiffusionPipeline, steps: int) -> int:
    """How many steps the pipeline is to be called with: those of its trajectory, or else `steps`."""
    trajectory = visited_by(getattr(pipeline, "scheduler", None))
    return steps if trajectory is None else len(trajectory)


def without_trajectory(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The same pipeline whose scheduler goes by a count again, where it was bound to a trajectory; else as it is."""
    own = pipeline.scheduler
    return pipeline if visited_by(own) is None else exchange_scheduler(pipeline, free_scheduler(own))

"""A scheduler bound to the timesteps of a trajectory: what that adds to a scheduler's class, and what it is without."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch

from octavo.diffusion.trajectories.trajectory import check_timesteps
from octavo.errors import OctavoError

SETTING, ETA = "trajectory", "eta"


class VisitsTrajectory:
    """What the classes of `trajectories.schedulers` add to the diffusers class that follows them among bases.

    `set_timesteps(K)`, as pipelines call it, sets the K timesteps of the trajectory; any other count raises
    `OctavoError`. All else is the diffusers class's.
    """

    config: Any
    takes_timesteps: ClassVar[bool] = True
    revision: ClassVar[int] = 0
    """Raised when what it samples changes, so that nothing kept from before is taken for it."""
    jumps_to_zero: ClassVar[bool] = False
    """Whether its last jump goes to timestep 0, so that the trajectory must end above."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Diffusers reads from `__init__`'s signature which settings a scheduler has: its own, and `trajectory`."""
        super().__init_subclass__(**kwargs)
        base: Any = cls.__mro__[2]

        def __init__(self: Any, *args: Any, trajectory: Any = None, **settings: Any) -> None:
            base.__init__(self, *args, **settings)
            if not isinstance(trajectory, (list, tuple)):
                raise OctavoError(f"{type(self).__name__}: needs the timesteps of its trajectory")
            check_timesteps(trajectory, self.config.num_train_timesteps)
            if self.jumps_to_zero and trajectory[-1] == 0:
                raise OctavoError(
                    "trajectory: ends at timestep 0, where DEIS itself jumps to; give one that ends above"
                )
            self.register_to_config(trajectory=list(trajectory))

        signature = inspect.signature(base.__init__)
        ours = inspect.Parameter(SETTING, inspect.Parameter.KEYWORD_ONLY, default=None)
        __init__.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*signature.parameters.values(), ours]
        )
        cls.__init__ = __init__  # type: ignore[method-assign]

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, *rest: Any, **further: Any
    ) -> None:
        """Set the trajectory's timesteps. Raises `OctavoError` for another count than theirs, or another list."""
        if SETTING not in self.config:  # Heun sets timesteps while it is made
            scheduler: Any = super()
            return scheduler.set_timesteps(num_inference_steps, device, *rest, **further)
        own = list(self.config.trajectory)
        given = further.pop("timesteps", None)
        if given is not None and list(given) != own:
            raise OctavoError(f"timesteps: the scheduler visits {own}; set another scheduler for others")
        if num_inference_steps not in (None, len(own)):
            raise OctavoError(
                f"num_inference_steps: {num_inference_steps}, but the scheduler visits a trajectory of {len(own)} "
                f"steps; give {len(own)}"
            )
        self._visit(own, device, **further)

    def _visit(self, timesteps: list[int], device: Any, **further: Any) -> None:
        scheduler: Any = super()
        if self.takes_timesteps:
            scheduler.set_timesteps(timesteps=timesteps, device=device, **further)
            self.num_inference_steps = len(timesteps)  # which DDPM leaves out
            return
        scheduler.set_timesteps(len(timesteps), device=device, **further)
        own: Any = self
        alpha_bars = own.alphas_cumprod[timesteps]
        own.sigmas = torch.cat([((1 - alpha_bars) / alpha_bars).sqrt().to(own.sigmas), own.sigmas[-1:]])
        own.timesteps = torch.tensor(timesteps).to(own.timesteps)


def plain_name(scheduler: Any) -> str:
    """The name of the scheduler's own class, or of the one that ours adds a trajectory to.

    >>> from octavo.diffusion.trajectories.schedulers import DDIMScheduler, DDPMTrajectoryScheduler
    >>> plain_name(DDPMTrajectoryScheduler(trajectory=[5, 0])), plain_name(DDIMScheduler())
    ('DDPMScheduler', 'DDIMScheduler')
    """
    kind = type(scheduler)
    return kind.__mro__[2].__name__ if issubclass(kind, VisitsTrajectory) else kind.__name__


def plain_config(scheduler: Any) -> dict[str, Any]:
    """The scheduler's settings without a trajectory, as those of the diffusers class; defaults among them."""
    config = {
        key: value for key, value in dict(scheduler.config).items() if key != SETTING and key[:1] != "_"
    }
    return {**config, "_class_name": plain_name(scheduler)}


def remade(kind: Any, scheduler: Any, **settings: Any) -> Any:
    """A scheduler of class `kind` with the settings of `scheduler` but for its trajectory, and with `settings`.

    Those that the class does not have stay in its configuration, where pipelines may look, and are not warned of; an
    eta of the scheduler's own goes.
    """
    config = {**plain_config(scheduler), **settings}
    del config["_class_name"]
    known = inspect.signature(kind.__init__).parameters
    made = kind.from_config({key: value for key, value in config.items() if key in known})
    made.register_to_config(**{key: value for key, value in config.items() if key not in {*known, ETA}})
    return made


def visited_by(scheduler: Any) -> tuple[int, ...] | None:
    """The trajectory that the scheduler is bound to; None for one that goes by a count."""
    return tuple(scheduler.config.trajectory) if isinstance(scheduler, VisitsTrajectory) else None


def free_scheduler(scheduler: Any) -> Any:
    """The scheduler that goes by a count where `scheduler` is bound to a trajectory; else `scheduler` itself."""
    if visited_by(scheduler) is None:
        return scheduler
    plain: Any = type(scheduler).__mro__[2]
    return plain.from_config(plain_config(scheduler))

"""Diffusers schedulers that visit a given trajectory: a thin layer over diffusers' own, saved and loaded as they are.

Pipelines hand their scheduler a count, `set_timesteps(50)`; some schedulers take a list instead, but few pipelines pass
one on. Each class here is the diffusers scheduler of its name with one more setting, `trajectory`, which
`set_timesteps` puts in the place of the count's timesteps.

natively        DDPM, predictor-corrector, DPM-Solver++ (multistep), Heun and Euler: `set_timesteps(timesteps=)`.
through sigmas  UniPC, DEIS and Euler ancestral compute with noise levels alone: those of the trajectory are put in.
respaced        DDIM derives the previous timestep from the count: it steps on a schedule of the K alpha-bars visited.
unconditional   the same for those that `octavo.diffusion.solvers.unconditional` fits to unconditional pipelines.
refused         PNDM, whose formulas hold for equal steps only, and whatever else is not in ADAPTERS.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, ClassVar

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from octavo.diffusion.solvers.eta import DDIMEtaScheduler
from octavo.diffusion.solvers.predictor_corrector import PredictorCorrectorScheduler
from octavo.diffusion.solvers.unconditional import (
    DEISMultistepUnconditionalScheduler,
    EulerAncestralDiscreteUnconditionalScheduler,
    EulerDiscreteUnconditionalScheduler,
    HeunDiscreteUnconditionalScheduler,
    UniPCMultistepUnconditionalScheduler,
)
from octavo.diffusion.trajectories.trajectory import check_timesteps
from octavo.errors import OctavoError

SETTING, ETA = "trajectory", "eta"
OWN_NOISE_LEVELS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
"""Settings by which a scheduler chooses noise levels itself; a trajectory takes their place."""


class VisitsTrajectory:
    """What the classes here add to the diffusers class that follows them in the order of bases.

    `set_timesteps(K)`, as pipelines call it, sets the K timesteps of the trajectory; any other count raises
    `OctavoError`. All else is the diffusers class's.
    """

    config: Any
    takes_timesteps: ClassVar[bool] = True
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


class DDPMTrajectoryScheduler(VisitsTrajectory, DDPMScheduler):
    """`DDPMScheduler` on a trajectory."""


class DPMSolverMultistepTrajectoryScheduler(VisitsTrajectory, DPMSolverMultistepScheduler):
    """`DPMSolverMultistepScheduler` (DPM-Solver++ 2M, SDE) on a trajectory."""


class HeunDiscreteTrajectoryScheduler(VisitsTrajectory, HeunDiscreteScheduler):
    """`HeunDiscreteScheduler` on a trajectory: 2 K - 1 evaluations, two at each timestep but the first."""


class EulerDiscreteTrajectoryScheduler(VisitsTrajectory, EulerDiscreteScheduler):
    """`EulerDiscreteScheduler` on a trajectory."""


class UniPCMultistepTrajectoryScheduler(VisitsTrajectory, UniPCMultistepScheduler):
    """`UniPCMultistepScheduler` on a trajectory."""

    takes_timesteps = False


class DEISMultistepTrajectoryScheduler(VisitsTrajectory, DEISMultistepScheduler):
    """`DEISMultistepScheduler` on a trajectory, which must end above 0: its last jump goes to timestep 0."""

    takes_timesteps = False
    jumps_to_zero = True


class EulerAncestralDiscreteTrajectoryScheduler(VisitsTrajectory, EulerAncestralDiscreteScheduler):
    """`EulerAncestralDiscreteScheduler` on a trajectory."""

    takes_timesteps = False


class DEISMultistepUnconditionalTrajectoryScheduler(VisitsTrajectory, DEISMultistepUnconditionalScheduler):
    """`DEISMultistepUnconditionalScheduler` on a trajectory, which must end above 0."""

    takes_timesteps = False
    jumps_to_zero = True


class EulerAncestralDiscreteUnconditionalTrajectoryScheduler(
    VisitsTrajectory, EulerAncestralDiscreteUnconditionalScheduler
):
    """`EulerAncestralDiscreteUnconditionalScheduler` on a trajectory."""

    takes_timesteps = False


class EulerDiscreteUnconditionalTrajectoryScheduler(VisitsTrajectory, EulerDiscreteUnconditionalScheduler):
    """`EulerDiscreteUnconditionalScheduler` on a trajectory."""


class HeunDiscreteUnconditionalTrajectoryScheduler(VisitsTrajectory, HeunDiscreteUnconditionalScheduler):
    """`HeunDiscreteUnconditionalScheduler` on a trajectory."""


class UniPCMultistepUnconditionalTrajectoryScheduler(VisitsTrajectory, UniPCMultistepUnconditionalScheduler):
    """`UniPCMultistepUnconditionalScheduler` on a trajectory."""

    takes_timesteps = False


class PredictorCorrectorTrajectoryScheduler(VisitsTrajectory, PredictorCorrectorScheduler):
    """`PredictorCorrectorScheduler` on a trajectory."""


class DDIMTrajectoryScheduler(VisitsTrajectory, DDIMScheduler):
    """`DDIMScheduler`, with its eta, on a trajectory: diffusers' own `step` on the alpha-bars of the K timesteps alone.

    With the timesteps that diffusers itself would visit, it computes the same bits.
    """

    def _visit(self, timesteps: list[int], device: Any, **further: Any) -> None:
        steps = len(timesteps)
        settings = {"num_train_timesteps": steps, "trained_betas": None, "rescale_betas_zero_snr": False}
        self._respaced = remade(DDIMScheduler, self, **settings)
        self._respaced.alphas_cumprod = self.alphas_cumprod[timesteps[::-1]]
        self._respaced.final_alpha_cumprod = self.final_alpha_cumprod
        self._respaced.set_timesteps(steps)
        self._positions = {t: steps - 1 - i for i, t in enumerate(timesteps)}
        self.num_inference_steps = steps
        self.timesteps = torch.tensor(timesteps, device=device)

    @functools.wraps(DDIMScheduler.step)
    def step(self, model_output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        if self.num_inference_steps is None:
            raise OctavoError("num_inference_steps: call set_timesteps first")
        position = self._positions.get(int(timestep))
        if position is None:
            raise OctavoError(f"timestep: {int(timestep)} is not one of the trajectory's")
        return self._respaced.step(model_output, position, *args, **kwargs)


class DDIMEtaTrajectoryScheduler(VisitsTrajectory, DDIMEtaScheduler):
    """`DDIMEtaScheduler`, DDIM that holds its eta, on a trajectory."""

    _positions: dict[int, int]
    _respaced: Any
    _visit = DDIMTrajectoryScheduler._visit

    @functools.wraps(DDIMScheduler.step)
    def step(
        self, model_output: Any, timestep: Any, sample: Any, eta: float = 0.0, *args: Any, **kwargs: Any
    ) -> Any:
        on_trajectory: Any = DDIMTrajectoryScheduler.step
        return on_trajectory(self, model_output, timestep, sample, self.eta_of_step(eta), *args, **kwargs)


ADAPTERS: dict[str, Any] = {
    adapter.__mro__[2].__name__: adapter
    for adapter in (
        DDIMTrajectoryScheduler,
        DDIMEtaTrajectoryScheduler,
        DDPMTrajectoryScheduler,
        DEISMultistepTrajectoryScheduler,
        DEISMultistepUnconditionalTrajectoryScheduler,
        DPMSolverMultistepTrajectoryScheduler,
        EulerAncestralDiscreteTrajectoryScheduler,
        EulerAncestralDiscreteUnconditionalTrajectoryScheduler,
        EulerDiscreteTrajectoryScheduler,
        EulerDiscreteUnconditionalTrajectoryScheduler,
        HeunDiscreteTrajectoryScheduler,
        HeunDiscreteUnconditionalTrajectoryScheduler,
        PredictorCorrectorTrajectoryScheduler,
        UniPCMultistepTrajectoryScheduler,
        UniPCMultistepUnconditionalTrajectoryScheduler,
    )
}
"""Diffusers' class, or one of `octavo.diffusion.solvers` -> the one that visits a trajectory."""
OWN_ADAPTERS: dict[str, Any] = {}
"""A scheduler that is Octavo's own -> the same on a trajectory; entered where these are defined."""


def lowest_timestep(scheduler: Any) -> int:
    """The lowest timestep that a trajectory may end at in the scheduler's solver: 1 for DEIS, which jumps to 0 itself.

    >>> lowest_timestep(DDIMScheduler()), lowest_timestep(DEISMultistepScheduler())
    (0, 1)
    """
    adapter = {**ADAPTERS, **OWN_ADAPTERS}.get(plain_name(scheduler))
    return int(adapter is not None and adapter.jumps_to_zero)


def plain_name(scheduler: Any) -> str:
    """The name of the scheduler's own class, or of the one that ours adds a trajectory to.

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

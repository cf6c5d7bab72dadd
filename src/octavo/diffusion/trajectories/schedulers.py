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
from typing import Any

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
from octavo.diffusion.trajectories.bound import VisitsTrajectory, plain_name, remade
from octavo.errors import OctavoError

OWN_NOISE_LEVELS: dict[str, Any] = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "interpolation_type": "linear",
}
"""Settings by which a scheduler chooses noise levels itself -> what leaves them to the trajectory."""


class DDPMTrajectoryScheduler(VisitsTrajectory, DDPMScheduler):
    """`DDPMScheduler` on a trajectory, whose last jump goes to the image as predicted, without noise.

    Diffusers leaves noise out at timestep 0 alone. A trajectory that ends at t above 0 would have 1 - abar_t of it
    (`fixed_large`), or what the network says (a learned variance), added to the finished image.
    """

    revision = 1

    @functools.wraps(DDPMScheduler.step)
    def step(
        self, model_output: Any, timestep: Any, sample: Any, generator: Any = None, return_dict: bool = True
    ) -> Any:
        last = int(timestep) == self.config.trajectory[-1]
        # at the last, what diffusers draws is thrown away: not from the images' own generators
        result = super().step(model_output, timestep, sample, torch.Generator() if last else generator)
        if last:
            result.prev_sample = result.pred_original_sample
        return result if return_dict else (result.prev_sample, result.pred_original_sample)


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

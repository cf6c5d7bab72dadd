"""What a sampler of one's own needs of a scheduler, as plain numbers: timesteps, alpha-bars, clipping, variances."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import DDIMScheduler

from octavo.diffusion.analytic.scheduler import AnalyticScheduler
from octavo.diffusion.solvers.eta import DDIMEtaScheduler
from octavo.diffusion.trajectories.bound import visited_by
from octavo.diffusion.trajectories.schedule import noise_schedule
from octavo.errors import OctavoError

FINAL = -1
"""In `previous_timesteps`: the jump to `final_alpha_cumprod`."""


def sampling_settings(scheduler: Any, steps: int) -> dict[str, Any]:
    """JSON-safe: how to sample as the scheduler does. The scheduler stays as it is.

    prediction_type      what the network predicts: "epsilon", "v_prediction", "sample", or another scheduler's own.
    alphas_cumprod       abar at each training timestep, where the scheduler has them.

    And where its timesteps are whole numbers of such a schedule:

    timesteps            those of its trajectory, or those that it visits in `steps` steps, each once.
    previous_timesteps   where each jump goes to; -1: to `final_alpha_cumprod`.
    final_alpha_cumprod  abar behind the last step: 1, or abar_0.
    clip_sample_range    predicted images are clipped to [-range, range]; null: they are not.
    eta                  of the DDIMEtaScheduler: sigma = eta sqrt((1 - abar_s) / (1 - abar_t) (1 - abar_t / abar_s)).
    variances            of the AnalyticScheduler: of the noise that it adds after each step; `kind` is its mean's.

    Raises `OctavoError` for a number of steps that the scheduler refuses.

    >>> found = sampling_settings(DDIMScheduler(), 4)
    >>> found["timesteps"], found["previous_timesteps"], found["clip_sample_range"]
    ([750, 500, 250, 0], [500, 250, 0, -1], 1.0)
    """
    found: dict[str, Any] = {"prediction_type": scheduler.config.get("prediction_type", "epsilon")}
    cumulative = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(cumulative, torch.Tensor):
        found["alphas_cumprod"] = [float(value) for value in cumulative]
    try:
        schedule = noise_schedule(scheduler)
    except OctavoError:  # flow matching, EDM, dynamic thresholding: the scheduler's own settings say it all
        return found
    own = copy.deepcopy(scheduler)
    trajectory = visited_by(scheduler)
    try:
        own.set_timesteps(steps if trajectory is None else len(trajectory))
    except ValueError as error:
        raise OctavoError(f"steps: {steps} cannot be set ({error})") from error
    visited = sorted(set(own.timesteps.tolist()), reverse=True)  # Heun evaluates twice at a timestep
    if any(t != int(t) for t in visited):
        return found
    timesteps = [int(t) for t in visited]
    previous = [*timesteps[1:], FINAL]
    if isinstance(scheduler, DDIMScheduler) and trajectory is None:
        stride = schedule.num_train_timesteps // len(timesteps)  # whatever it visits next
        previous = [max(t - stride, FINAL) for t in timesteps]
    found |= {
        "timesteps": timesteps,
        "previous_timesteps": previous,
        "final_alpha_cumprod": schedule.final_alpha_bar,
        "clip_sample_range": schedule.clip,
    }
    if isinstance(own, DDIMEtaScheduler):
        found["eta"] = float(own.config.eta)
    if isinstance(own, AnalyticScheduler):
        found |= {"variances": own.variances().tolist(), "kind": own.config.kind}
    return found

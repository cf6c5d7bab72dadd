"""Put optimal variances under a pipeline: its own network and noise schedule, sampled by the AnalyticScheduler."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from octavo.diffusion.analytic.gamma import Gamma
from octavo.diffusion.analytic.scheduler import AnalyticScheduler, AnalyticTrajectoryScheduler
from octavo.diffusion.analytic.variance import LARGEST, LAST_NOISE
from octavo.diffusion.denoiser import find_denoiser
from octavo.diffusion.exchange import exchange_scheduler
from octavo.diffusion.trajectories.bound import SETTING, plain_config, visited_by
from octavo.diffusion.trajectories.schedule import check_schedule
from octavo.errors import OctavoError
from octavo.fingerprint import fingerprint, model_identity, same_model

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def with_analytic_variance(
    pipeline: DiffusionPipeline,
    gamma: Gamma,
    kind: str = "ddpm",
    *,
    last_noise: float | None = LAST_NOISE,
    largest_variance: float = LARGEST,
    networks: Mapping[str, nn.Module] | None = None,
) -> DiffusionPipeline:
    """The same pipeline sampled with optimal variances; see `AnalyticScheduler` for the settings.

    It visits what the pipeline visited: a trajectory of its own, or as many timesteps as it is called with. Networks
    are shared, `pipeline` stays as it was; a DDIMPipeline, which gives its scheduler arguments that only DDIM knows,
    becomes a DDPMPipeline. Where images are decoded (`vae`) noise is added to no 8-bit levels: the last is not clipped.
    `save_pretrained` writes a folder that plain `from_pretrained` loads after `import octavo`.

    networks  component -> the network that executes in its place, as `gamma` was estimated on.

    Raises `OctavoError` for a Gamma of another model, of the same model in other bits, or of another noise schedule,
    and for a kind that is neither "ddpm" nor "ddim".

    >>> with_analytic_variance(pipeline, estimate_gamma(pipeline))(num_inference_steps=10)  # doctest: +SKIP
    """
    check_gamma(pipeline, gamma, networks)
    own = pipeline.scheduler
    if hasattr(pipeline, "vae"):
        last_noise = None
    settings: dict[str, Any] = {
        "kind": kind,
        "gamma_timesteps": list(gamma.timesteps),
        "gamma": list(gamma.values),
        "last_noise": last_noise,
        "largest_variance": largest_variance,
    }
    trajectory, adapter = visited_by(own), AnalyticScheduler
    if trajectory is not None:
        adapter = AnalyticTrajectoryScheduler
        settings[SETTING] = list(trajectory)
    # diffusers would keep what the class does not know, and warn of it when it loads
    known = inspect.signature(adapter.__init__).parameters
    config = {key: value for key, value in plain_config(own).items() if key in known}
    config.setdefault("clip_sample", False)  # of one that never clips; diffusers' default here is to
    scheduler = adapter.from_config(config, **settings)
    return exchange_scheduler(pipeline, scheduler)


def check_gamma(
    pipeline: DiffusionPipeline, gamma: Gamma, networks: Mapping[str, nn.Module] | None = None
) -> None:
    """Raise `OctavoError` unless `gamma` is of this pipeline's network and noise schedule."""
    check_schedule(pipeline.scheduler, gamma, "gamma", "estimate it on this model")
    component, denoiser = find_denoiser(pipeline)
    if gamma.model is not None and not same_model(gamma.model, model_identity(denoiser)):
        raise OctavoError(f"gamma: is of another model, not of this {component}; estimate it on this one")
    if gamma.network is not None and gamma.network != fingerprint((networks or {}).get(component, denoiser)):
        raise OctavoError(
            f"gamma: is of this {component} in other bits, or of other versions of octavo or diffusers; estimate it on "
            "this one"
        )


def check_no_gamma(pipeline: DiffusionPipeline) -> None:
    """Raise `OctavoError` for a pipeline that is to be quantized and has optimal variances already.

    They are of its network as it is: the quantized one has a Gamma of its own, which `check_gamma` insists on.
    """
    if isinstance(pipeline.scheduler, AnalyticScheduler):
        raise OctavoError(
            "scheduler: its optimal variances (Gamma) are of the network before it is quantized; quantize the model "
            "under another scheduler, then measure them on the result: octavo analytic"
        )

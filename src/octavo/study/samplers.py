"""The samplers of the study: DDIM or DDPM, made from the pipeline's own noise schedule, or its own scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from octavo.diffusion import find_denoiser, with_denoiser
from octavo.diffusion.samplers import with_scheduler
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Kind = Literal["ddim", "ddpm", "own"]


@dataclass(frozen=True)
class Sampler:
    """A scheduler and its number of steps. "own" keeps the pipeline's scheduler.

    >>> str(Sampler("ddim", 50))
    'DDIM-50'
    """

    kind: Kind
    steps: int

    def __post_init__(self) -> None:
        if self.kind not in ("ddim", "ddpm", "own"):
            raise OctavoError(f"sampler: {self.kind!r} is not one of ddim, ddpm, own")
        if self.steps < 1:
            raise OctavoError(f"steps: {self.steps} is not at least 1")

    def __str__(self) -> str:
        return f"{self.kind if self.kind == 'own' else self.kind.upper()}-{self.steps}"


def with_sampler(pipeline: DiffusionPipeline, sampler: Sampler) -> DiffusionPipeline:
    """A pipeline that shares every network with `pipeline` and has a scheduler of the sampler's kind, and of its own.

    The new scheduler is made from the configuration of the old one: same betas, prediction type, clipping. `pipeline`
    stays as it was. Raises `OctavoError` where the noise schedule does not fit (flow matching has no betas), or has
    fewer training timesteps than the sampler has steps.
    """
    if sampler.kind == "own":
        component, denoiser = find_denoiser(pipeline)
        return with_denoiser(pipeline, component, denoiser)
    trained = pipeline.scheduler.config.get("num_train_timesteps", sampler.steps)
    if sampler.steps > trained:
        raise OctavoError(f"sampler: {sampler} has more steps than the {trained} the model was trained on")
    return with_scheduler(pipeline, sampler.kind)

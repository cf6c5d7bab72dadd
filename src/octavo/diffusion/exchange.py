"""A pipeline with another scheduler or network, the original as it was; and whether two sample by one scheduler."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def exchange_scheduler(pipeline: DiffusionPipeline, scheduler: Any) -> DiffusionPipeline:
    """The same pipeline under `scheduler`, as it is; networks are shared.

    A DDIMPipeline gives its scheduler arguments that only DDIM knows, and turns any other back into DDIM's where it is
    built anew, so under another it becomes a DDPMPipeline. Whether the two fit is the caller's to see.
    """
    from diffusers import DDIMScheduler, DDPMPipeline

    if type(pipeline).__name__ == "DDIMPipeline" and not isinstance(scheduler, DDIMScheduler):
        plain = DDPMPipeline(unet=pipeline.unet, scheduler=scheduler)
        plain.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
        return plain
    other = copy.copy(pipeline)
    other.__dict__.pop("save_pretrained", None)  # bound to the pipeline it was copied from
    other.register_modules(scheduler=scheduler)
    return other


def with_denoiser(pipeline: DiffusionPipeline, component: str, denoiser: nn.Module) -> DiffusionPipeline:
    """A pipeline of the same class and settings with `denoiser` in its place and a scheduler of its own.

    The other components are shared with `pipeline`, which stays as it was.
    """
    other = copy.copy(pipeline)
    other.__dict__.pop("save_pretrained", None)  # bound to the pipeline it was copied from
    setattr(other, component, denoiser)
    other.scheduler = copy.deepcopy(pipeline.scheduler)
    return other


def same_scheduler(a: DiffusionPipeline, b: DiffusionPipeline) -> bool:
    """Whether both pipelines sample by one class of scheduler with one setting, its trajectory included."""
    kinds = [type(pipeline.scheduler) for pipeline in (a, b)]
    settings = [
        {key: value for key, value in dict(pipeline.scheduler.config).items() if key[:1] != "_"}
        for pipeline in (a, b)
    ]
    return kinds[0] is kinds[1] and settings[0] == settings[1]

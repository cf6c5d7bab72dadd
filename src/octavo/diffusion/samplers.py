"""Another sampler for a pipeline: the same network, denoised by a scheduler of the user's choice."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

import torch

from octavo.errors import OctavoError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SHORT_NAMES = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
}
PLAIN = ("DDIMPipeline", "DDPMPipeline")
"""Pipelines that hand x_t to the network as it is, start from unit noise, and give `step` a generator."""


def with_scheduler(pipeline: DiffusionPipeline, name: str) -> DiffusionPipeline:
    """The same pipeline with the scheduler that `name` names, made from the configuration of its own.

    `name` is a diffusers class ("DDPMScheduler") or one of SHORT_NAMES. The networks are shared, `pipeline` stays as
    it was. A DDIMPipeline, which gives its scheduler arguments that only DDIM knows, becomes a DDPMPipeline under
    another scheduler. Raises `OctavoError` for a scheduler that does not exist or does not fit the pipeline.

    >>> with_scheduler(None, "dimm")
    Traceback (most recent call last):
        ...
    octavo.errors.OctavoError: scheduler: 'dimm' is neither ddim, ddpm, dpmsolver++ nor a scheduler of diffusers
    """
    import diffusers

    class_name = SHORT_NAMES.get(name.lower(), name)
    kind: Any = getattr(diffusers, class_name, None) if class_name.endswith("Scheduler") else None
    if not hasattr(kind, "from_config"):
        raise OctavoError(
            f"scheduler: {name!r} is neither {', '.join(SHORT_NAMES)} nor a scheduler of diffusers"
        )
    own = pipeline.scheduler
    fitting = {type(own).__name__, *(other.__name__ for other in own.compatibles)}
    if class_name not in fitting:
        raise OctavoError(f"scheduler: {class_name} does not fit {type(own).__name__}'s configuration")
    scheduler = kind.from_config(own.config)
    if type(pipeline).__name__ in PLAIN:
        _check_plain(scheduler)
        if type(pipeline).__name__ == "DDIMPipeline" and class_name != "DDIMScheduler":
            # DDIMPipeline would also turn the scheduler back into DDIM's where it is built anew
            plain = diffusers.DDPMPipeline(unet=pipeline.unet, scheduler=scheduler)
            plain.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
            return plain
    other = copy.copy(pipeline)
    other.__dict__.pop("save_pretrained", None)  # bound to the pipeline it was copied from
    other.register_modules(scheduler=scheduler)
    return other


def _check_plain(scheduler: Any) -> None:
    """Raise `OctavoError` unless an unconditional pipeline can drive the scheduler."""
    name = type(scheduler).__name__
    if "generator" not in inspect.signature(scheduler.step).parameters:
        raise OctavoError(f"scheduler: {name} takes no generator, which an unconditional pipeline gives it")
    trial = copy.deepcopy(scheduler)
    trial.set_timesteps(10)
    ones = torch.ones(1, 1, 2, 2)
    scaled = trial.scale_model_input(ones, trial.timesteps[0])
    if not torch.equal(scaled, ones) or float(trial.init_noise_sigma) != 1.0:
        raise OctavoError(
            f"scheduler: {name} scales the network's input, which an unconditional pipeline does not"
        )

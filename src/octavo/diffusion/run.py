"""Call anybody's diffusers pipeline for images k, k+1, ... with one generator each."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch

from octavo.diffusion.call_inputs import inputs_of_images
from octavo.diffusion.call_signature import FLAGS, checked_arguments
from octavo.diffusion.denoiser import find_denoiser, num_classes
from octavo.diffusion.solvers.eta import DDIMEtaScheduler, checked_eta
from octavo.diffusion.solvers.variance_exploding import corrected_by_image, step_name
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def call_pipeline(
    pipeline: DiffusionPipeline,
    *,
    generators: Sequence[torch.Generator],
    num_inference_steps: int,
    inputs: Mapping[str, Any] | None = None,
    output_type: str = "np",
    first_image: int = 0,
) -> Any:
    """Sample len(generators) images and return them as the pipeline does for this `output_type`.

    Image j of the call is image k = first_image + j of the whole run. `inputs` are further arguments of the
    pipeline's `__call__`, described for the whole run: of a list or a tensor [N, ...] of prompts, embeddings, class
    labels, pictures or latents (`PER_IMAGE`) image k gets element k modulo its length, and one on its own serves every
    image. Every other value describes the whole call and is handed over as it is. Of several ControlNets each gets its
    own picture of a list, for every image; of a list of such lists image k gets the k-th.

    Image k's noise comes from its own generator only: where a pipeline does not pass `generator` to a
    scheduler's `step` that takes one (DiTPipeline), it is passed here. A scheduler whose `step` draws noise
    and takes no generator (DPMSolverSDE) stays as it is. The step sizes of a variance-exploding model's corrector,
    which diffusers takes from the whole batch, are each image's own (`corrected_by_image`).

    `eta`, DDIM's (2010.02502, equation 16), is a number from 0, no noise, to 1, DDPM's. Where a pipeline does not hand
    it to a scheduler's `step` that takes one (DDPMPipeline), it is handed over here. It goes before an eta that the
    scheduler holds (`DDIMEtaScheduler`).

    Runs without gradients and without the pipeline's progress bar; the bar's setting and `scheduler.step` are
    restored. Raises OctavoError for an input that is missing, unknown or set by Octavo itself, for a class label that
    the network does not embed, an eta out of range or of a scheduler that has none, for more steps than the schedule
    has timesteps, and for fewer than an image-to-image run's `strength` leaves any of; whatever the pipeline raises
    passes through. Class labels are required of a class-conditional network, also where the pipeline would draw them
    itself (ConsistencyModelPipeline).
    """
    if not generators:
        raise OctavoError("generators: there is none; give one for each image")
    if not isinstance(inputs, Mapping | None):
        raise OctavoError(
            f"inputs: {inputs!r:.60} is no mapping; give arguments by name: inputs={{'prompt': ...}}"
        )
    check_number_of_steps(pipeline, num_inference_steps)
    given = inputs_of_images(inputs or {}, range(first_image, first_image + len(generators)), pipeline)
    eta = _eta_of_step(pipeline, given)
    arguments = checked_arguments(
        pipeline,
        given,
        generator=list(generators),
        num_inference_steps=num_inference_steps,
        output_type=output_type,
    )
    _check_class_labels(pipeline, (inputs or {}).get("class_labels"))
    _check_strength(pipeline, arguments)
    with (
        torch.no_grad(),
        _no_progress_bar(pipeline),
        _step_with_eta(pipeline, eta),
        _seeded_step(pipeline, list(generators)),
        corrected_by_image(getattr(pipeline, "scheduler", None)),
    ):
        return cast("Callable[..., Any]", pipeline)(**arguments)[0]


def _eta_of_step(pipeline: DiffusionPipeline, inputs: dict[str, Any]) -> float | None:
    """The eta among `inputs`, checked; taken out of them where the pipeline's call takes none."""
    if "eta" not in inputs:
        return None
    eta = inputs["eta"]
    given = checked_eta(f"inputs: eta{FLAGS['eta']}", eta)
    scheduler = getattr(pipeline, "scheduler", None)
    step = getattr(scheduler, step_name(scheduler), None)
    if step is None or "eta" not in inspect.signature(step).parameters:
        raise OctavoError(
            f"inputs: eta{FLAGS['eta']}: is DDIM's, and {type(scheduler).__name__} has none; leave it out, or name the "
            "scheduler ddim"
        )
    if "eta" not in inspect.signature(type(pipeline).__call__).parameters:
        del inputs["eta"]
    return given


def check_number_of_steps(pipeline: DiffusionPipeline, steps: int) -> None:
    """Raise `OctavoError` for more steps than a schedule of discrete timesteps has; diffusers tells it in many ways."""
    scheduler = getattr(pipeline, "scheduler", None)
    trained = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
    free = type(scheduler).__name__.startswith("FlowMatch") or getattr(
        scheduler, "any_number_of_steps", False
    )
    if isinstance(trained, int) and not free and steps > trained:
        raise OctavoError(
            f"steps: {steps:,} is more than the {trained:,} timesteps that the model was trained with"
        )


def _check_strength(pipeline: DiffusionPipeline, arguments: Mapping[str, Any]) -> None:
    """Raise OctavoError where an image-to-image run would make none of its steps; diffusers fails on empty tensors."""
    parameter = inspect.signature(type(pipeline).__call__).parameters.get("strength")
    strength = arguments.get("strength", getattr(parameter, "default", None))
    steps = arguments["num_inference_steps"]
    if isinstance(strength, (int, float)) and 0 < strength <= 1 and int(steps * strength) < 1:
        raise OctavoError(
            f"steps: {steps} at a strength of {strength} leave none to make; give {math.ceil(1 / strength)} or more"
        )


def _check_class_labels(pipeline: DiffusionPipeline, labels: Any) -> None:
    """Raise OctavoError for a label, of whichever image of the run, that is no index of the network's classes."""
    count = None if labels is None else num_classes(find_denoiser(pipeline)[1])
    if count is None:
        return
    for label in labels if isinstance(labels, list) else torch.as_tensor(labels).flatten().tolist():
        if label not in range(count):
            raise OctavoError(
                f"inputs: class_labels{FLAGS['class_labels']}: {label!r} is out of range; "
                f"this model has {count:,} classes, 0 to {count - 1}"
            )


@contextmanager
def replaced_step(scheduler: Any, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Within the block `scheduler.step` is `wrap(scheduler.step)`, with the signature of the original.

    A scheduler without one has it done to `step_pred` (`step_name`). Only the instance is touched, and it is restored
    whatever happens. The signature matters: pipelines look into it to learn whether the scheduler takes `eta` or a
    generator.
    """
    name = step_name(scheduler)
    before = getattr(scheduler, name)
    was_own = name in vars(scheduler)
    setattr(scheduler, name, functools.wraps(before)(wrap(before)))
    try:
        yield
    finally:
        if was_own:
            setattr(scheduler, name, before)
        else:
            delattr(scheduler, name)


@contextmanager
def _step_with_eta(pipeline: DiffusionPipeline, eta: float | None) -> Iterator[None]:
    """Within the block every `scheduler.step` goes by `eta`, whatever it is handed, unless that is None."""
    if eta is None:
        yield
        return
    scheduler = pipeline.scheduler
    own = scheduler.called_with(eta) if isinstance(scheduler, DDIMEtaScheduler) else nullcontext()
    with own, replaced_step(scheduler, lambda step: functools.partial(step, eta=eta)):
        yield


@contextmanager
def _seeded_step(pipeline: DiffusionPipeline, generators: list[torch.Generator]) -> Iterator[None]:
    """Within the block a `scheduler.step` called without a generator gets those of the images."""
    scheduler = getattr(pipeline, "scheduler", None)
    signature = inspect.signature(getattr(scheduler, step_name(scheduler))) if scheduler is not None else None
    if signature is None or "generator" not in signature.parameters:
        yield
        return

    def wrap(step: Callable[..., Any]) -> Callable[..., Any]:
        def seeded(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind_partial(*args, **kwargs).arguments
            if given.get("generator") is None and "model_output" in given:
                # A guided batch repeats the images (i, i + B, ...), and the generators with them.
                repeats, rest = divmod(given["model_output"].shape[0], len(generators))
                if rest == 0:
                    kwargs["generator"] = generators * repeats
            return step(*args, **kwargs)

        return seeded

    with replaced_step(scheduler, wrap):
        yield


@contextmanager
def _no_progress_bar(pipeline: DiffusionPipeline) -> Iterator[None]:
    if not hasattr(pipeline, "set_progress_bar_config"):
        yield
        return
    before = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)

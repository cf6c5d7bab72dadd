"""Catch what a sampler hands to its network, at chosen steps, by running the user's own pipeline."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from octavo.diffusion.denoiser import find_denoiser
from octavo.diffusion.generators import generators as image_generators
from octavo.diffusion.pairs import WITHOUT_ROWS, CalibrationPair, map_leaves
from octavo.diffusion.run import call_pipeline, replaced_step
from octavo.diffusion.trajectories.use import steps_of
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Found = TypeVar("Found")


@dataclass(frozen=True)
class Probe:
    """What one call of the denoiser looks like.

    num_steps       T, the sampler steps that the run makes, which is what steps left count: the length of
                    `scheduler.timesteps`, or fewer where it starts from an image (`strength`) or ends early.
    timesteps       the trajectory: the training timestep of each step, from the noisy end.
    rows_per_image  1, or 2 with batched guidance.
    parameters      names of the forward's parameters that the pipeline fills.
    skipped         timesteps of the scheduler that the run leaves out (`strength`, `denoising_end`).
    """

    num_steps: int
    timesteps: tuple[float, ...]
    rows_per_image: int
    parameters: tuple[str, ...]
    skipped: int = 0


def probe(
    pipeline: DiffusionPipeline, *, num_inference_steps: int, inputs: Mapping[str, Any] | None = None
) -> Probe:
    """Start one image and stop at the denoiser's first call, before any network evaluation.

    T is not always `num_inference_steps` (Heun makes nearly two evaluations for each), so ask before drawing
    steps. Raises OctavoError if the pipeline has no denoiser or no scheduler, or an input is missing.
    """
    pipeline, scheduler = _with_own_scheduler(pipeline)
    found: list[Probe] = []

    def look(args: dict[str, Any], step: int) -> None:
        timesteps = tuple(_visited(pipeline, scheduler, args).tolist())
        skipped = len(scheduler.timesteps) - len(timesteps)
        found.append(Probe(len(timesteps), timesteps, _num_rows(args), tuple(args), skipped))
        raise _EnoughSeen

    _watch(pipeline, look, lambda step: None, image_generators(0, 0, 1), num_inference_steps, inputs, 0)
    return _the_first(found, pipeline)


def first_call(
    pipeline: DiffusionPipeline,
    *,
    batch_size: int = 1,
    num_inference_steps: int | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The (args, kwargs) of the denoiser's first call for a batch, before any network evaluation.

    `denoiser(*args, **kwargs)` repeats the call; every argument comes by name, so args is (). Tensors are
    copies, on the pipeline's device. The images are those of seed 0. `num_inference_steps`: None takes those of
    the scheduler's trajectory, or else 10. Raises OctavoError as `probe` does.
    """
    if num_inference_steps is None:
        num_inference_steps = steps_of(pipeline, 10)
    pipeline, _ = _with_own_scheduler(pipeline)
    found: list[dict[str, Any]] = []

    def look(args: dict[str, Any], step: int) -> None:
        _num_rows(args)
        found.append(
            map_leaves(args, lambda _, leaf: leaf.detach().clone() if torch.is_tensor(leaf) else leaf)
        )
        raise _EnoughSeen

    seeded = image_generators(0, 0, batch_size)
    _watch(pipeline, look, lambda step: None, seeded, num_inference_steps, inputs, 0)
    return (), _the_first(found, pipeline)


def capture_pairs(
    pipeline: DiffusionPipeline,
    draws: Sequence[Sequence[int]],
    *,
    generators: Sequence[torch.Generator],
    num_inference_steps: int,
    inputs: Mapping[str, Any] | None = None,
    first_image: int = 0,
) -> list[CalibrationPair]:
    """Run one batch through the pipeline and keep what the denoiser was handed at each image's drawn steps.

    draws[j] holds the steps left (1..T) at which image first_image + j is caught, one or several; an image
    with t steps left has made T - t steps. A denoiser called several times within a step (sequential
    guidance) gives a pair for each call. Of guided rows [r * B, ...] those of image j are j, j + B, ... The
    run stops once the last drawn step is over, not at its first call: more may follow within the step.

    Returns the pairs by image, then in the order of its draws, then of the calls; a step drawn twice gives
    its pair twice. See `call_pipeline` for `generators`, `inputs` and `first_image`. The pipeline is left as
    it was, also after an error. Raises OctavoError for draws that do not fit the sampler. Source: PTQ4DM
    (2211.15736), Algorithm 1.
    """
    pipeline, scheduler = _with_own_scheduler(pipeline)
    batch_size = len(generators)
    if len(draws) != batch_size or not batch_size:
        raise OctavoError(f"draws: {len(draws)} images are drawn for {batch_size} generators")
    for j, drawn in enumerate(draws):
        if not len(drawn) or min(drawn) < 1:
            raise OctavoError(f"draws: image {first_image + j} needs one or more steps left, each at least 1")
    last_drawn = max(max(drawn) for drawn in draws)
    fewest_left = min(min(drawn) for drawn in draws)
    caught: dict[tuple[int, int], list[CalibrationPair]] = {}
    num_steps = 0

    def catch(args: dict[str, Any], step: int) -> None:
        nonlocal num_steps
        if step == 0:
            num_steps = len(_visited(pipeline, scheduler, args))
        if last_drawn > num_steps:
            raise OctavoError(f"draws: {last_drawn} steps left, but the sampler makes {num_steps} steps")
        for j, drawn in enumerate(draws):
            if num_steps - step in drawn:
                pair = _cut(args, j, batch_size, first_image + j, step, num_steps - step)
                caught.setdefault((j, num_steps - step), []).append(pair)

    def stop_after(step: int) -> None:
        if num_steps - step <= fewest_left:
            raise _EnoughSeen

    _watch(pipeline, catch, stop_after, generators, num_inference_steps, inputs, first_image)
    for j, drawn in enumerate(draws):
        for t in drawn:
            if (j, t) not in caught:
                raise OctavoError(
                    f"draws: the sampler never called its network with {t} of {num_steps} steps left "
                    f"(image {first_image + j})"
                )
    return [pair for j, drawn in enumerate(draws) for t in drawn for pair in caught[j, t]]


def sample_shape(
    pipeline: DiffusionPipeline, inputs: Mapping[str, Any] | None = None
) -> tuple[int, int, int]:
    """(height, width, channels) of what the network denoises, latents too; zeros if that is no picture."""
    _, kwargs = first_call(pipeline, inputs=inputs)
    shape = next(iter(kwargs.values())).shape[1:]
    channels, height, width = shape if len(shape) == 3 else (0, 0, 0)
    return height, width, channels


class _EnoughSeen(BaseException):
    """Ends the pipeline's run. Not an Exception, so that no `except Exception` in a pipeline swallows it."""


def _watch(
    pipeline: DiffusionPipeline,
    on_call: Callable[[dict[str, Any], int], None],
    on_step: Callable[[int], None],
    generators: Sequence[torch.Generator],
    num_inference_steps: int,
    inputs: Mapping[str, Any] | None,
    first_image: int,
) -> None:
    """Run the pipeline with `on_call(args, step)` before each network call, `on_step(step)` before each step.

    `step` counts the finished steps. Either function ends the run by raising _EnoughSeen.
    """
    _, denoiser = find_denoiser(pipeline)
    network = getattr(denoiser, "_orig_mod", denoiser)
    # of the class: an engine's or a hook's `forward` stands in its instance, and takes anything
    signature = inspect.signature(MethodType(type(network).forward, network))
    finished = 0

    def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        on_call(_by_name(signature, args, kwargs), finished)

    def counted(step: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            nonlocal finished
            on_step(finished)
            result = step(*args, **kwargs)
            finished += 1
            return result

        return count

    with ExitStack() as stack:
        hook = denoiser.register_forward_pre_hook(before_forward, with_kwargs=True)
        stack.callback(hook.remove)
        stack.enter_context(replaced_step(_scheduler(pipeline), counted))
        try:
            call_pipeline(
                pipeline,
                generators=generators,
                num_inference_steps=num_inference_steps,
                inputs=inputs,
                output_type="pt",
                first_image=first_image,
            )
        except _EnoughSeen:
            # What a pipeline's call ends with; without it an offloaded model would stay on the accelerator.
            getattr(pipeline, "maybe_free_model_hooks", lambda: None)()


def _the_first(found: list[Found], pipeline: DiffusionPipeline) -> Found:
    if not found:
        raise OctavoError(f"pipeline: {type(pipeline).__name__} never called its denoiser")
    return found[0]


def _with_own_scheduler(pipeline: DiffusionPipeline) -> tuple[DiffusionPipeline, Any]:
    """The pipeline on a copy of its scheduler, and that copy: a run leaves timesteps and history in a scheduler."""
    own = copy.copy(pipeline)
    own.scheduler = copy.deepcopy(_scheduler(pipeline))
    return own, own.scheduler


def _visited(pipeline: DiffusionPipeline, scheduler: Any, args: Mapping[str, Any]) -> Tensor:
    """The timesteps that the run under way visits, `args` being what its first call handed over.

    Image-to-image pipelines skip the scheduler's first (`strength`), others may stop before its last (`denoising_end`).
    """
    timesteps: Tensor = scheduler.timesteps
    own = getattr(pipeline, "_num_timesteps", None)
    if not isinstance(own, int) or not 0 < own < len(timesteps):
        return timesteps
    told = torch.as_tensor(args.get("timestep", torch.nan)).flatten()[0]
    return timesteps[:own] if told == timesteps[0] else timesteps[-own:]


def _scheduler(pipeline: DiffusionPipeline) -> Any:
    scheduler = getattr(pipeline, "scheduler", None)
    if scheduler is None:
        raise OctavoError(f"pipeline: {type(pipeline).__name__} has no scheduler to count its steps by")
    return scheduler


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments by parameter name, without the defaults that the caller left alone."""
    named: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            named[name] = value
    return named


def _num_rows(args: dict[str, Any]) -> int:
    """Rows of the call's batch: the leading size of its first argument, the noisy sample."""
    sample = next(iter(args.values()), None)
    if not isinstance(sample, Tensor) or sample.ndim == 0:
        raise OctavoError("denoiser: its first argument is not a batch of samples, one row for each image")
    timestep = args.get("timestep")
    if isinstance(timestep, Tensor) and timestep.ndim > 1:
        raise OctavoError(
            "denoiser: is told a timestep for each token of an image, and Octavo takes one for each image; of Wan, "
            "take one whose pipeline has expand_timesteps false"
        )
    return sample.shape[0]


def _cut(
    args: dict[str, Any], j: int, batch_size: int, image: int, step: int, steps_left: int
) -> CalibrationPair:
    """The pair of image j of the batch: rows j, j + B, ... of each tensor as long as the batch."""
    num_rows = _num_rows(args)
    if num_rows % batch_size:
        raise OctavoError(f"denoiser: {num_rows} rows do not divide among {batch_size} images")
    per_row: set[str] = set()

    def cut(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.ndim and leaf.shape[0] == num_rows and path not in WITHOUT_ROWS:
            per_row.add(path)
            leaf = leaf[j::batch_size]
        return leaf.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)

    cut_args = map_leaves(args, cut)
    return CalibrationPair(cut_args, frozenset(per_row), num_rows // batch_size, image, step, steps_left)

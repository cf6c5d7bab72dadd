"""What a pipeline hands to another network of its own than the denoiser: its calls, caught by running the pipeline."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from octavo.diffusion.denoiser import find_denoiser
from octavo.diffusion.exchange import with_denoiser
from octavo.diffusion.generators import generators as image_generators
from octavo.diffusion.pairs import CalibrationPair, map_leaves
from octavo.diffusion.run import call_pipeline
from octavo.diffusion.trajectories.use import steps_of
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def part_calls(
    pipeline: DiffusionPipeline,
    part: nn.Module,
    *,
    generators: Sequence[torch.Generator],
    num_inference_steps: int,
    inputs: Mapping[str, Any] | None = None,
    first_image: int = 0,
) -> list[CalibrationPair]:
    """Make one batch of images, to the end, and keep every call of `part`, a module of the pipeline.

    A call is kept whole, as one pair: its rows are images, tiles of one or frames, as the pipeline cuts them. See
    `call_pipeline` for the rest. Nothing is changed. Raises OctavoError if the pipeline never calls `part`.
    """
    caught: list[CalibrationPair] = []
    signature = inspect.signature(MethodType(type(part).forward, part))

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = {
            name: value
            for name, value in signature.bind(*args, **kwargs).arguments.items()
            if value is not signature.parameters[name].default
        }
        caught.append(_whole(named, first_image))

    hook = part.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        call_pipeline(
            pipeline,
            generators=generators,
            num_inference_steps=num_inference_steps,
            inputs=inputs,
            output_type="pt",
            first_image=first_image,
        )
    finally:
        hook.remove()
    if not caught:
        raise OctavoError(
            f"pipeline: {type(pipeline).__name__} never called its {type(part).__name__}, so that nothing is known of "
            "what it reads"
        )
    return caught


def first_part_call(
    pipeline: DiffusionPipeline,
    part: nn.Module,
    *,
    batch_size: int = 1,
    inputs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The keyword arguments of the first call of `part` for a batch of images: of use for its shapes, not its values.

    The denoiser is evaluated once, and what it gave serves every step. The run ends before `part` is evaluated. Raises
    OctavoError as `part_calls` does.
    """
    component, denoiser = find_denoiser(pipeline)
    stub = copy.copy(denoiser)
    given: list[Any] = []

    def repeat(*args: Any, **kwargs: Any) -> Any:
        if not given:
            given.append(denoiser(*args, **kwargs))
        return given[0]

    stub.__dict__["forward"] = repeat
    hook = part.register_forward_pre_hook(_stop, with_kwargs=True)
    try:
        part_calls(
            with_denoiser(pipeline, component, stub),
            part,
            generators=image_generators(0, 0, batch_size),
            num_inference_steps=steps_of(pipeline, 10),
            inputs=inputs,
        )
    except _Reached as reached:
        getattr(pipeline, "maybe_free_model_hooks", lambda: None)()
        named = inspect.signature(MethodType(type(part).forward, part)).bind(*reached.args, **reached.kwargs)
        return dict(named.arguments)
    finally:
        hook.remove()
    raise AssertionError("part_calls tells that nothing was called")


class _Reached(BaseException):
    """Ends the pipeline's run. Not an Exception, so that no `except Exception` in a pipeline swallows it."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__(*args)
        self.kwargs = kwargs


def _stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _Reached(args, kwargs)


def _whole(named: dict[str, Any], image: int) -> CalibrationPair:
    sample = next(iter(named.values()))
    rows = sample.shape[0]
    per_row: set[str] = set()

    def kept(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.ndim and leaf.shape[0] == rows:
            per_row.add(path)
        return leaf.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)

    return CalibrationPair(map_leaves(named, kept), frozenset(per_row), rows, image, 0, 0)

"""One trajectory of the full-precision pipeline: what its network is handed, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from octavo.calibration.tracing import evaluating
from octavo.diffusion import CalibrationPair, capture_pairs, collate, generators, probe
from octavo.diffusion.pairs import map_leaves
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class TrajectoryStep:
    """One sampler iteration of a batch of images.

    step      iterations made before it, from 0 at the noisy end.
    timestep  the training timestep that the network is told.
    calls     what the network is handed, by parameter name; several where guidance is evaluated in turn.
    """

    step: int
    timestep: float
    calls: tuple[dict[str, Any], ...]


def trajectory(
    pipeline: DiffusionPipeline,
    *,
    num_images: int = 4,
    steps: int = 50,
    seed: int = 0,
    max_steps: int = 50,
    inputs: Mapping[str, Any] | None = None,
) -> list[TrajectoryStep]:
    """Denoise images 0 .. num_images-1 and keep what the network is handed, from the noisy end.

    Of a sampler that makes more than `max_steps` steps, `max_steps` are kept, evenly spaced, with the first and the
    last. Memory: the samples of these steps. Raises `OctavoError` for counts below 1 or inputs that do not fit.
    """
    for name, value in (("num_images", num_images), ("steps", steps), ("max_steps", max_steps)):
        if value < 1:
            raise OctavoError(f"{name}: {value} is not at least 1")
    found = probe(pipeline, num_inference_steps=steps, inputs=inputs)
    kept = evenly_spaced(found.num_steps, max_steps)
    pairs = capture_pairs(
        pipeline,
        [[found.num_steps - step for step in kept]] * num_images,
        generators=generators(seed, 0, num_images),
        num_inference_steps=steps,
        inputs=inputs,
    )
    return [
        TrajectoryStep(step, float(found.timesteps[step]), _calls(pairs, step, num_images)) for step in kept
    ]


def evenly_spaced(count: int, at_most: int) -> list[int]:
    """At most so many of 0 .. count-1, evenly spaced, with both ends.

    >>> evenly_spaced(9, 3), evenly_spaced(3, 50), evenly_spaced(9, 1)
    ([0, 4, 8], [0, 1, 2], [0])
    """
    if count <= at_most:
        return list(range(count))
    return [round(i * (count - 1) / max(at_most - 1, 1)) for i in range(at_most)]


def replay(denoiser: nn.Module, steps: list[TrajectoryStep]) -> Iterator[int]:
    """Evaluate `denoiser` on every call of the trajectory; yields i after the calls of steps[i].

    In evaluation mode, without gradients; both are restored when the loop ends.
    """
    device = next(denoiser.parameters()).device
    with torch.inference_mode(), evaluating(denoiser):
        for i, step in enumerate(steps):
            for call in step.calls:
                moved = map_leaves(call, lambda _, leaf: leaf.to(device) if torch.is_tensor(leaf) else leaf)
                denoiser(**{**moved, "return_dict": False})
            yield i


def _calls(pairs: list[CalibrationPair], step: int, num_images: int) -> tuple[dict[str, Any], ...]:
    by_image: list[list[CalibrationPair]] = [[] for _ in range(num_images)]
    for pair in pairs:
        if pair.step == step:
            by_image[pair.image].append(pair)
    return tuple(collate(list(call)) for call in zip(*by_image, strict=True))

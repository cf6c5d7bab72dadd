"""Images from seeds: image k depends on seed + k alone."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from octavo.diffusion import call_pipeline, generators
from octavo.diffusion.solvers.adaptive import solve_adaptive
from octavo.diffusion.solvers.inside_pipeline import Solved
from octavo.diffusion.solvers.rk45 import solve_rk45
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Images = NDArray[np.float32]
SOLVING: dict[str, Any] = {"rk45": solve_rk45, "adaptive": solve_adaptive}
"""Solvers that choose the steps of each image themselves."""


def generate(
    pipeline: DiffusionPipeline,
    num_images: int,
    *,
    steps: int = 50,
    seed: int = 0,
    batch_size: int = 16,
    inputs: Mapping[str, Any] | None = None,
    progress: bool = True,
    label: str = "sample",
) -> Images:
    """Sample images 0 .. num_images-1: float32 [N, height, width, channels] in [0, 1].

    Image k starts from, and draws all its noise from, one generator seeded with seed + k, so it is the same image
    whatever the batch size, up to the rounding of kernels that differ between batch sizes. `inputs`: see
    `octavo.diffusion.call_pipeline`. All is kept in memory; for many images see `octavo.evaluation.shards`. Raises
    `OctavoError` for a count below 1 or inputs that do not fit.
    """
    check_counts(num_images=num_images, steps=steps, batch_size=batch_size)
    batches = []
    with tqdm(total=num_images, desc=label, unit="image", disable=not progress) as bar:
        for first, count in image_batches(num_images, batch_size):
            batches.append(sample(pipeline, first, count, steps=steps, seed=seed, inputs=inputs))
            bar.update(count)
    return np.concatenate(batches)


def generate_solving(
    pipeline: DiffusionPipeline,
    solver: str,
    num_images: int,
    *,
    seed: int = 0,
    inputs: Mapping[str, Any] | None = None,
    progress: bool = True,
    label: str = "sample",
    tolerances: Mapping[str, float] | None = None,
) -> Solved:
    """`generate` by "rk45" or "adaptive": images, one after the other, and the evaluations that each of them took.

    `tolerances` are `rtol` and `atol` of `octavo.diffusion.solvers`' `solve_rk45` or `solve_adaptive`. Raises
    `OctavoError` for an unknown solver, and as those do.
    """
    if solver not in SOLVING:
        raise OctavoError(f"solver: {solver!r} is not one of {', '.join(SOLVING)}")
    check_counts(num_images=num_images)
    with tqdm(total=num_images, desc=label, unit="image", disable=not progress) as bar:
        solved: Solved = SOLVING[solver](
            pipeline,
            generators=generators(seed, 0, num_images),
            inputs=inputs,
            on_image=bar.update,
            **(tolerances or {}),
        )
    checked_images(solved.images)
    return solved


def image_batches(num_images: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """The first image and the number of images of each batch; the last may be shorter.

    >>> list(image_batches(7, 3))
    [(0, 3), (3, 3), (6, 1)]
    """
    return ((first, min(batch_size, num_images - first)) for first in range(0, num_images, batch_size))


def whole_batches(num_images: int, batch_size: int) -> int:
    """How many images are made for `num_images` where the last batch is whole too, as in `generate_shards`.

    >>> whole_batches(10, 4)
    12
    """
    return -(-num_images // batch_size) * batch_size


def sample(
    pipeline: DiffusionPipeline,
    first: int,
    count: int,
    *,
    steps: int,
    seed: int,
    inputs: Mapping[str, Any] | None = None,
) -> Images:
    """Sample images first .. first+count-1 in one batch: float32 [count, height, width, channels] in [0, 1].

    Raises `OctavoError` for a pipeline that makes videos, and for an image of NaN or infinity.
    """
    check_makes_images(pipeline)
    images = call_pipeline(
        pipeline,
        generators=generators(seed, first, count),
        num_inference_steps=steps,
        inputs=inputs,
        output_type="np",
        first_image=first,
    )
    return checked_images(np.asarray(images, dtype=np.float32), first)


def checked_images(images: Images, first: int = 0) -> Images:
    """`images`, which are image `first` of a run and those after it. Raises `OctavoError` for NaN or infinity.

    A U-Net's are told by the engine that runs it; these are of what comes after it, as a VAE that overflows in fp16.
    """
    bad = ~np.isfinite(images).reshape(len(images), -1).all(axis=1)
    if bad.any():
        raise OctavoError(
            f"image {first + int(bad.argmax())}: holds NaN or infinity, which a component of the pipeline computes (a "
            "VAE in fp16 overflows, say); load it in float32"
        )
    return images


def check_makes_images(pipeline: DiffusionPipeline) -> None:
    """Raise `OctavoError` for a pipeline that makes videos: what is measured on images has no meaning for them."""
    if "num_frames" in inspect.signature(type(pipeline).__call__).parameters:
        raise OctavoError(f"pipeline: {type(pipeline).__name__} makes videos; sample them by its own call")


def check_counts(**counts: int) -> None:
    """Raise `OctavoError` for a count below 1, under its name."""
    for name, value in counts.items():
        if value < 1:
            raise OctavoError(f"{name}: {value} is not at least 1")


def to_uint8(images: Images) -> NDArray[np.uint8]:
    """[0, 1] floats to 0..255 as diffusers does it: round(255 x)."""
    return (images * 255).round().clip(0, 255).astype(np.uint8)

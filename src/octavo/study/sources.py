"""Calibration samples made another way: noise, raw images, or noised images, under the same timesteps (table 2)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.calibration import PairStore
from octavo.diffusion import CalibrationPair, find_denoiser, flatten, sample_shape, with_denoiser
from octavo.diffusion.run import replaced_step
from octavo.errors import OctavoError
from octavo.evaluation.generate import image_batches
from octavo.evaluation.generate import sample as sample_images

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

NOISE_STREAM = 1 << 30
"""Added to the seed of a pair's noise, so that it shares no random stream with the images (seed + k). Torch's CPU
generator reads 32 bits of a seed only, so that an offset above them would be none."""


def pairs_from(
    source: str, pairs: PairStore, folder: Path, scheduler: Any, clean: Tensor, *, steps: int, seed: int
) -> PairStore:
    """The same pairs with another sample in each, written to `folder`; timesteps and conditions stay.

        forward   x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, at the pair's own t (`scheduler.add_noise`)
        raw       x_0 itself
        noise     x_T = noise, as the sampler's first call reads it

    `clean`: float32 [images, ...], x_0 as the network reads images; a pair takes that of its image. Samples are scaled
    as the scheduler scales its own (`scale_model_input`), except raw ones. Raises `OctavoError` for an unknown source,
    or clean images of another shape than the pairs' samples. Source: PTQ4DM (2211.15736), section 3.3. Network calls of
    one step (guidance, one call after the other) get one sample, as the sampler hands it to them.
    """
    if source not in ("forward", "raw", "noise"):
        raise OctavoError(f"source: {source!r} is not forward, raw or noise")
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    made = PairStore(folder, len(pairs))
    draw = -1
    for i in range(len(pairs)):
        batch, calls = [], list[CalibrationPair]()
        for pair in pairs.load(i):
            if not _is_further_call(pair, calls):
                calls, draw = [], draw + 1
            calls.append(pair)
            name, sample = next(iter(pair.args.items()))
            x_0 = clean[pair.image % len(clean)]
            _check_shape(x_0.shape, sample.shape[1:])
            noise = torch.randn(
                x_0.shape, generator=torch.Generator().manual_seed(seed + NOISE_STREAM + draw)
            )
            x = _sample(source, scheduler, pair, x_0, noise).to(sample.dtype)
            batch.append(replace(pair, args={**pair.args, name: x.expand(sample.shape).clone()}))
        made.save(i, batch)
    return made


def _is_further_call(pair: CalibrationPair, calls: list[CalibrationPair]) -> bool:
    """Whether `pair` is the next network call of the step that `calls` are of; a step drawn again repeats a call."""
    if not calls or (pair.image, pair.step) != (calls[0].image, calls[0].step):
        return False
    tensors, rest = flatten(pair)
    for theirs, their_rest in map(flatten, calls):
        if rest == their_rest and all(torch.equal(tensors[name], theirs[name]) for name in tensors):
            return False
    return True


def _sample(source: str, scheduler: Any, pair: CalibrationPair, x_0: Tensor, noise: Tensor) -> Tensor:
    if source == "raw":
        return x_0
    if source == "noise":
        return _scaled(scheduler, float(scheduler.init_noise_sigma) * noise, scheduler.timesteps[0])
    timestep = scheduler.timesteps[pair.step]
    return _scaled(scheduler, scheduler.add_noise(x_0[None], noise[None], timestep[None])[0], timestep)


def _scaled(scheduler: Any, sample: Tensor, timestep: Tensor) -> Tensor:
    """What the sampler would hand to its network at this timestep; schedulers count their own calls, hence the copy."""
    scaled: Tensor = copy.deepcopy(scheduler).scale_model_input(sample, timestep)
    return scaled


def own_samples(
    pipeline: DiffusionPipeline,
    num_images: int,
    *,
    steps: int,
    seed: int,
    batch_size: int,
    inputs: Mapping[str, Any] | None = None,
) -> Tensor:
    """x_0 of images 0 .. num_images-1 of `pipeline`, as its network reads them: float32 [N, ...], on the CPU.

    What the sampler's last step returns: for a latent model latents, never decoded and encoded again.
    """
    component, denoiser = find_denoiser(pipeline)
    pipeline = with_denoiser(pipeline, component, denoiser)  # with a scheduler of its own
    last: list[Tensor] = []

    def kept(step: Callable[..., Any]) -> Callable[..., Any]:
        def keep(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            last[:] = [result[0]]
            return result

        return keep

    batches = []
    with replaced_step(pipeline.scheduler, kept):
        for first, count in image_batches(num_images, batch_size):
            sample_images(pipeline, first, count, steps=steps, seed=seed, inputs=inputs)
            batches.append(last[0][:count].detach().float().cpu())  # guided rows repeat the images
    return torch.cat(batches)


def check_fits(
    images: NDArray[np.uint8], pipeline: DiffusionPipeline, inputs: Mapping[str, Any] | None = None
) -> None:
    """Raise `OctavoError` unless real images can be x_0 of `pipeline`: of pixels, and as many as its network reads."""
    if getattr(pipeline, "vae", None) is not None:
        raise OctavoError(
            "images: this model works on latents; leave them out, and its own samples are taken"
        )
    height, width, channels = sample_shape(pipeline, inputs)
    _check_shape((images.shape[3], *images.shape[1:3]), (channels, height, width))


def _check_shape(given: tuple[int, ...], read: tuple[int, ...]) -> None:
    if tuple(given) != tuple(read):
        shapes = (" x ".join(map(str, shape)) for shape in (given, read))
        raise OctavoError("images: of {} (channels, height, width), but the network reads {}".format(*shapes))


def given_samples(images: NDArray[np.uint8], num_images: int, *, seed: int) -> Tensor:
    """x_0 of real images, uint8 [M, height, width, channels]: float32 [N, channels, height, width] in [-1, 1].

    A seeded choice of N, each once where M allows it.
    """
    generator = torch.Generator().manual_seed(seed + NOISE_STREAM)
    rounds = -(-num_images // len(images))
    chosen = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(rounds)])[:num_images]
    pixels = torch.from_numpy(np.ascontiguousarray(images[chosen.numpy()]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1

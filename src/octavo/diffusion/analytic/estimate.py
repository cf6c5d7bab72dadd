"""Gamma_t estimated on a network as it executes, on images that it makes itself, batch by batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from octavo.diffusion.analytic.gamma import Gamma
from octavo.diffusion.denoiser import find_denoiser
from octavo.diffusion.generators import check_seed, generators
from octavo.diffusion.trajectories.jump_costs import (
    IMAGE_STEPS,
    LIBRARIES,
    SEED_STREAM,
    check_count,
    chosen_candidates,
)
from octavo.diffusion.trajectories.own_images import own_images
from octavo.diffusion.trajectories.schedule import Floats, NoiseSchedule, noise_schedule
from octavo.diffusion.trajectories.visit import check_visits_all, visit
from octavo.errors import OctavoError
from octavo.files import atomic_path, cache_folder
from octavo.fingerprint import fingerprint, model_identity, pipeline_fingerprint, versions
from octavo.work import held

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FORMAT = 2
"""Raised when a change of how Gamma is measured makes stored measurements stale."""
FEWEST_IMAGES = 8
IMAGES = 128


def cost_of_gamma(num_candidates: int, images: int, num_train_timesteps: int = 1000) -> int:
    """Evaluations of the network, one for each image, that `estimate_gamma` takes.

    Of each image: the steps in which it is made, one of noise that the pipeline draws itself, one at each candidate.

    >>> cost_of_gamma(100, 128)
    19328
    """
    return images * (min(IMAGE_STEPS, num_train_timesteps) + 1 + num_candidates)


def candidates_for(pipeline: DiffusionPipeline, given: int | Sequence[int] | None = None) -> tuple[int, ...]:
    """The ascending timesteps that `estimate_gamma` measures at; `given` as its `candidates`."""
    return chosen_candidates(given, noise_schedule(pipeline.scheduler).num_train_timesteps)


def estimate_gamma(
    pipeline: DiffusionPipeline,
    *,
    candidates: int | Sequence[int] | None = None,
    images: int = IMAGES,
    seed: int = 0,
    batch_size: int = 16,
    inputs: Mapping[str, Any] | None = None,
    workdir: str | os.PathLike[str] | None = None,
    networks: Mapping[str, nn.Module] | None = None,
    runtime: Sequence[Any] = (),
    progress: bool = True,
    on_kept: Callable[[int], Any] = lambda evaluations: None,
) -> Gamma:
    """Estimate Gamma_t = E || eps_theta(x_t, t) ||^2 / d, x_t ~ q(x_t | x_0), x_0 made by the model in 50 DDIM steps.

    Of each image and timestep || eps_theta ||^2, || eps ||^2 and <eps, x_0> are measured, where eps is the noise that
    was added. The means of the last two are known, d and 0, and most of the first's spread is theirs: it is taken out
    by regression (control variates), so that few images do. What stays is the spread between images.

    The data's own x_0 would be better than the model's; without data, what the model gets wrong of them is in Gamma.

    Image k's noise depends on seed + k alone, in a stream apart from that of images that are judged. What is measured
    stays in `workdir` (default: Octavo's cache) under the name of all that decides it: a killed run goes on after the
    last whole batch. `cost_of_gamma` tells the cost before.

    candidates  the timesteps, ascending, or how many, evenly spaced; None: 100, or all of a shorter schedule. Between
                them Gamma is interpolated, see `octavo.diffusion.analytic.gamma.interpolated`.
    networks    component -> the network that executes in its place, whose contents then name the work.
    runtime     what else decides what they compute, JSON-safe (the engine, its precision).
    on_kept     told how many evaluations an earlier run left, which are not made again.

    Raises `OctavoError` for counts or a seed out of range, a scheduler without alpha-bars, inputs with which the
    pipeline leaves out timesteps, predictions that are not finite, or while another process measures the same. Source:
    Bao et al. (2201.06503), equation 8.
    """
    schedule = noise_schedule(pipeline.scheduler)
    check_count("images", images, FEWEST_IMAGES)
    check_count("batch_size", batch_size, 1)
    check_seed(seed, SEED_STREAM, images)
    timesteps = chosen_candidates(candidates, schedule.num_train_timesteps)
    check_visits_all(pipeline, inputs)
    component, denoiser = find_denoiser(pipeline)
    decisions = [FORMAT, "gamma", list(timesteps), images, seed, batch_size, IMAGE_STEPS, *runtime]
    decisions += [list(versions(*LIBRARIES).values()), torch.get_num_threads()]
    name = pipeline_fingerprint(pipeline, decisions, inputs, networks)
    folder = (Path(workdir) if workdir else cache_folder() / "gamma") / name
    folder.mkdir(parents=True, exist_ok=True)
    rounds = cost_of_gamma(len(timesteps), 1, schedule.num_train_timesteps)
    batches: list[Floats] = []
    wanted = [
        (first, min(batch_size, images - first), folder / f"squares-{first:06d}.safetensors")
        for first in range(0, images, batch_size)
    ]
    with held(folder, f"{folder}: another process measures the same; wait for it"):
        kept = rounds * sum(count for _, count, path in wanted if path.is_file())
        on_kept(kept)
        told: dict[str, Any] = {"desc": "measure gamma", "unit": "evaluation", "disable": not progress}
        with tqdm(total=images * rounds, initial=kept, **told) as bar:
            for first, count, path in wanted:
                if path.is_file():
                    batches.append(_load(path, (3, count, len(timesteps))))
                    continue
                own = generators(seed + SEED_STREAM, first, count)
                batches.append(_measure(pipeline, schedule, timesteps, own, first, inputs, bar.update))
                _save(path, batches[-1])
    measured = np.concatenate(batches, axis=1)
    if not np.isfinite(measured).all():
        raise OctavoError(
            f"{component}: its predictions are not finite at some of the timesteps, so that Gamma cannot be estimated"
        )
    values, errors = controlled_means(*measured)
    return Gamma(
        timesteps,
        tuple(float(value) for value in values),
        tuple(float(error) for error in errors),
        schedule.num_train_timesteps,
        schedule.prediction_type,
        images,
        images * rounds,
        seed,
        model_identity(denoiser),
        fingerprint((networks or {}).get(component, denoiser)),
        {"runtime": list(runtime)} if runtime else {},
        schedule.digest,
    )


def controlled_means(squares: Floats, noise: Floats, overlap: Floats) -> tuple[Floats, Floats]:
    """Means over images, and their standard errors, of `squares` [M, N], by regression on the two others, of mean 0.

    Column by column: the intercept of the least-squares fit of squares to 1, noise and overlap. Source: Owen, Monte
    Carlo theory, methods and examples (2013), section 8.9.

    >>> noise, overlap = np.random.default_rng(0).normal(size=(2, 50, 1))
    >>> means, errors = controlled_means(3 + 2 * noise - overlap, noise, overlap)
    >>> round(float(means[0]), 9), bool(errors[0] < 1e-9)
    (3.0, True)
    """
    count, num = squares.shape
    means, errors = np.empty(num), np.empty(num)
    for column in range(num):
        design = np.stack([np.ones(count), noise[:, column], overlap[:, column]], axis=1)
        fit, _, rank, _ = np.linalg.lstsq(design, squares[:, column], rcond=None)
        left = squares[:, column] - design @ fit
        means[column] = fit[0]
        spread = float(left @ left) / max(1, count - int(rank))
        errors[column] = np.sqrt(max(0.0, spread * float(np.linalg.pinv(design.T @ design)[0, 0])))
    return means, errors


def _measure(
    pipeline: DiffusionPipeline,
    schedule: NoiseSchedule,
    candidates: Sequence[int],
    own: Sequence[torch.Generator],
    first: int,
    inputs: Mapping[str, Any] | None,
    on_images: Callable[[int], Any],
) -> Floats:
    """[3, M, N]: || eps_theta ||^2 / d, || eps ||^2 / d - 1 and <eps, x_0> / d of M images at N ascending timesteps."""
    where: dict[str, Any] = {"generators": own, "inputs": inputs, "first_image": first}
    images = own_images(pipeline, schedule, steps=IMAGE_STEPS, **where)
    on_images(len(images) * min(IMAGE_STEPS, schedule.num_train_timesteps))
    order = [candidates[-1], *reversed(candidates)]
    found = np.zeros((3, len(images), len(candidates)))
    exact = images.double().flatten(1)

    def noised(index: int, like: Tensor) -> Tensor:
        noise = torch.stack([torch.randn(images.shape[1:], generator=generator) for generator in own])
        flat = noise.double().flatten(1)
        column = len(candidates) - index
        found[1, :, column] = flat.square().mean(1).numpy() - 1
        found[2, :, column] = (flat * exact).mean(1).numpy()
        return schedule.noised(images, noise, order[index]).to(like)

    def on_prediction(index: int, prediction: Tensor, state: Tensor) -> Tensor | None:
        on_images(len(images))
        if index > 0:
            _, eps = schedule.split(prediction, state, order[index])
            squares = eps.detach().cpu().double().flatten(1).square().mean(1)
            found[0, :, len(candidates) - index] = squares.numpy()
        return noised(index + 1, state) if index + 1 < len(order) else None

    visit(pipeline, order, on_prediction, **where)
    return found


def _save(path: Path, measured: Floats) -> None:
    with atomic_path(path) as temporary:
        save_file({"measured": np.ascontiguousarray(measured)}, temporary)


def _load(path: Path, shape: tuple[int, ...]) -> Floats:
    try:
        measured: Floats = load_file(path)["measured"]
        if measured.dtype != np.float64 or measured.shape != shape:
            raise ValueError(f"{measured.dtype} {measured.shape}")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise OctavoError(f"{path}: not readable as measurements; delete it and start again") from error
    return measured

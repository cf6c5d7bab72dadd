"""Collect calibration pairs: run the pipeline, keep what its network is handed, on disk, batch by batch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from octavo.calibration.recipe import PTQ4DM
from octavo.calibration.tracing import evaluating
from octavo.diffusion import (
    AsPublished,
    CalibrationPair,
    capture_pairs,
    draw_labelled,
    find_denoiser,
    flatten,
    generators,
    probe,
    unflatten,
)
from octavo.diffusion.call_inputs import inputs_of_images
from octavo.errors import OctavoError
from octavo.files import atomic_path
from octavo.processes import Processes

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

IMAGE_STREAM = 1 << 31
"""Added to the seeds of calibration's images, so that nobody samples, or judges a model by, the very images that it was
calibrated on: image k of `octavo.quantize(seed=0)` is not image k of `octavo sample --seed 0`."""
DRAW_STREAM = 0x5EED
"""Added to the seed of the draws, so that they share no random stream with the images (seed + k)."""


@dataclass(frozen=True)
class PairStore:
    """Calibration pairs in a folder, one safetensors file a batch; iterating reads one batch at a time."""

    folder: Path
    num_batches: int

    def path(self, batch: int) -> Path:
        return self.folder / f"pairs-{batch:05d}.safetensors"

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[CalibrationPair]]:
        return (self.load(batch) for batch in range(self.num_batches))

    def has(self, batch: int) -> bool:
        return self.path(batch).is_file()

    def save(self, batch: int, pairs: Sequence[CalibrationPair]) -> None:
        tensors: dict[str, torch.Tensor] = {}
        descriptions = []
        for i, pair in enumerate(pairs):
            pair_tensors, description = flatten(pair)
            descriptions.append(description)
            # a step drawn twice gives its pair twice, and safetensors takes no tensors that share memory
            tensors.update({f"{i}/{name}": tensor.clone() for name, tensor in pair_tensors.items()})
        with atomic_path(self.path(batch)) as temporary:
            save_file(tensors, temporary, metadata={"pairs": json.dumps(descriptions)})

    def load(self, batch: int) -> list[CalibrationPair]:
        """The pairs of one batch. Raises `OctavoError` if the file is damaged."""
        path = self.path(batch)
        try:
            with safe_open(path, "pt") as file:
                descriptions = json.loads(file.metadata()["pairs"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise OctavoError(
                f"{path}: not readable as calibration pairs; delete it and start again"
            ) from error
        pairs = []
        for i, description in enumerate(descriptions):
            prefix = f"{i}/"
            mine = {
                key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
            }
            pairs.append(unflatten(mine, description))
        return pairs


def collect_pairs(
    pipeline: DiffusionPipeline,
    recipe: PTQ4DM,
    folder: Path,
    *,
    seed: int = 0,
    batch_size: int = 16,
    inputs: Mapping[str, Any] | None = None,
    processes: Processes | None = None,
    progress: bool = True,
) -> PairStore:
    """PTQ4DM's Algorithm 1: draw N steps, denoise each image down to its step in full precision, keep the input.

    Image k starts from the noise of seed + k + 2^31. Images that stop at similar steps share a batch, so that a batch
    can stop early. Batches already in `folder` are kept: a killed run goes on where it stopped, to the same bits.
    Process r of `processes` makes every W-th batch; it returns when all are made.
    """
    together = processes or Processes()
    num_steps = probe(pipeline, num_inference_steps=recipe.steps, inputs=inputs).num_steps
    batches = plan_batches(recipe, num_steps, seed, batch_size)
    store = PairStore(folder, len(batches))
    _, denoiser = find_denoiser(pipeline)
    own = list(enumerate(batches))[together.rank :: together.count]
    with tqdm(
        total=sum(batch.evaluations for _, batch in own),
        desc="collect",
        unit="evaluation",
        disable=not progress,
    ) as bar:
        for i, batch in own:
            if store.has(i):
                bar.update(batch.evaluations)
                continue
            with evaluating(denoiser), _counted(denoiser, bar):
                pairs = _capture(pipeline, batch, recipe.steps, seed, inputs)
            store.save(i, pairs)
    together.wait()
    return store


@dataclass(frozen=True)
class Batch:
    """Images that are denoised together, until the last is caught.

    `captured[j]`: the steps left at which image `images[j]` is caught; `labels[j]`: as which they are labelled, for
    `AsPublished` only. `evaluations`: of the network, each on the whole batch.
    """

    images: list[int]
    captured: list[list[int]]
    labels: list[list[int]] | None
    evaluations: int


def plan_batches(recipe: PTQ4DM, num_steps: int, seed: int, batch_size: int) -> list[Batch]:
    """Draw the steps of every image and sort images into batches by the last step each must reach."""
    generator = torch.Generator().manual_seed(seed + DRAW_STREAM)
    draws = draw_labelled(recipe.distribution, recipe.samples, num_steps, generator)
    per_image = recipe.pairs_per_trajectory
    captured, labels = (
        [part[i : i + per_image] for i in range(0, recipe.samples, per_image)]
        for part in (draws.captured.tolist(), draws.label.tolist())
    )
    order = sorted(range(len(captured)), key=lambda k: (-min(captured[k]), k))
    batches = []
    for start in range(0, len(order), batch_size):
        images = order[start : start + batch_size]
        steps_left = [captured[k] for k in images]
        evaluations = num_steps - min(map(min, steps_left)) + 1
        as_published = [labels[k] for k in images] if isinstance(recipe.distribution, AsPublished) else None
        batches.append(Batch(images, steps_left, as_published, evaluations))
    return batches


def _capture(
    pipeline: DiffusionPipeline, batch: Batch, steps: int, seed: int, inputs: Mapping[str, Any] | None
) -> list[CalibrationPair]:
    pairs = capture_pairs(
        pipeline,
        batch.captured,
        generators=[generators(seed + IMAGE_STREAM, k, 1)[0] for k in batch.images],
        num_inference_steps=steps,
        inputs=inputs_of_images(inputs or {}, batch.images, pipeline),
    )
    if batch.labels is not None:
        # pairs come in the order of batch.captured, one for each network call of the step: 2 where guidance is one
        # after the other, 1 where it is switched off. Two draws may share a step and differ in their label
        calls = Counter((pair.image, pair.steps_left) for pair in pairs)
        labels = [
            label
            for j, (captured, row) in enumerate(zip(batch.captured, batch.labels, strict=True))
            for steps_left, label in zip(captured, row, strict=True)
            for _ in range(calls[j, steps_left] // captured.count(steps_left))
        ]
        pairs = [_mislabelled(pair, label) for pair, label in zip(pairs, labels, strict=True)]
    return [replace(pair, image=batch.images[pair.image]) for pair in pairs]


def _mislabelled(pair: CalibrationPair, label: int) -> CalibrationPair:
    """As the research code does it: the network is told its index among the sampler's steps (see `AsPublished`)."""
    return replace(pair, args={**pair.args, "timestep": torch.tensor(label - 1)})


@contextmanager
def _counted(denoiser: nn.Module, bar: tqdm[Any]) -> Iterator[None]:
    def count(module: nn.Module, args: Any) -> None:
        bar.update(1)

    hook = denoiser.register_forward_pre_hook(count)
    try:
        yield
    finally:
        hook.remove()

"""How good the images of a trajectory are: their Frechet distance, from the same noise for every trajectory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from octavo.diffusion.trajectories import Trajectory, noise_schedule, with_trajectory
from octavo.diffusion.trajectories.jump_costs import SEED_STREAM
from octavo.errors import OctavoError
from octavo.evaluation.features import FeatureExtractor, extract
from octavo.evaluation.frechet import FeatureStatistics, gaussian
from octavo.evaluation.generate import image_batches, sample, to_uint8
from octavo.evaluation.trajectory_methods import evaluations_on
from octavo.files import read_json, write_json

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SCORES = "scores.json"
FORMAT = 2
"""Raised when a change of how distances are measured makes stored ones stale."""


class FrechetScore:
    """Timesteps => the Frechet distance of `images` images of the pipeline's own solver on them to `target`.

    Image k of every trajectory starts from the noise of seed + k in a stream of its own, so that trajectories are
    compared on the same noise, and none is chosen for the images it is evaluated on later. The distance of a sample is
    too large by about c / images; that is nearly the same for all, and what a search compares is not what it reports.
    Scores are kept in `folder`, if given: one asked for again, after a kill too, costs nothing; one that was killed on
    its way is made anew. `on_images(n)` is called after every n images that are made, `on_kept(n)` for a score of n
    images that is at hand.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        extractor: FeatureExtractor,
        target: FeatureStatistics,
        *,
        images: int,
        seed: int = 0,
        batch_size: int = 16,
        inputs: Mapping[str, Any] | None = None,
        folder: Path | None = None,
        on_images: Callable[[int], Any] = lambda count: None,
        on_kept: Callable[[int], Any] = lambda count: None,
    ) -> None:
        self.pipeline, self.extractor, self.images = pipeline, extractor, images
        self.seed, self.batch_size, self.inputs = seed, batch_size, inputs
        self.on_images, self.on_kept = on_images, on_kept
        self.network_evaluations = 0
        """Of every score asked for, whether it was at hand or not; one for each image."""
        self._target = gaussian(target)
        self._path = None if folder is None else folder / SCORES
        self._known = {} if self._path is None else _read(self._path)
        self._schedule = noise_schedule(pipeline.scheduler)

    def __call__(self, timesteps: tuple[int, ...]) -> float:
        self.network_evaluations += self.images * evaluations_on(self.pipeline.scheduler, len(timesteps))
        name = " ".join(map(str, timesteps))
        if name in self._known:
            self.on_kept(self.images)
            return self._known[name]
        schedule = self._schedule
        one = Trajectory(timesteps, schedule.num_train_timesteps, schedule.prediction_type, "tried")
        pipeline = with_trajectory(self.pipeline, one)
        features = []
        for first, count in image_batches(self.images, self.batch_size):
            drawn = sample(
                pipeline,
                first,
                count,
                steps=one.num_steps,
                seed=self.seed + SEED_STREAM,
                inputs=self.inputs,
            )
            features.append(extract(self.extractor, to_uint8(drawn)).pooled)
            self.on_images(count)
        self._known[name] = gaussian(torch.cat(features)).distance(self._target)
        if self._path is not None:
            write_json(self._path, self._known)
        return self._known[name]


def _read(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    scores = read_json(path)
    if not isinstance(scores, dict) or not all(type(score) is float for score in scores.values()):
        raise OctavoError(f"{path}: not readable as scores; delete it and start again")
    return scores

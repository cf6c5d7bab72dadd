"""How good a choice is, as one number from images of the same noise for all: FD, or PSNR to the reference's images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.errors import OctavoError
from octavo.evaluation.features import extract
from octavo.evaluation.frechet import frechet_distance
from octavo.evaluation.generate import Images, generate, to_uint8
from octavo.evaluation.shards import job_name
from octavo.evaluation.similarity import psnr
from octavo.evaluation.trajectory_search import Target
from octavo.files import read_json, write_json

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

METRICS = ("fd", "psnr")
SCORES = "scores.json"
IMAGE_STREAM = 5 << 28
"""Added to the seeds of the images that choices are made by, so that the winner is verified on others."""


class Quality:
    """Pipeline and steps => FD to the target's statistics, or mean PSNR in dB to the reference's images.

    fd    less is better; images as 8-bit pixels through the target's features.
    psnr  more is better; only between samplers that make the same image of the same noise (ODE solvers), and images
          that are equal count as 100 dB.

    Every score is kept in `folder` under the name of all that decides its images: none is measured twice. Raises
    `OctavoError` for another metric, or a damaged file.
    """

    def __init__(
        self,
        metric: str,
        folder: Path,
        *,
        num_images: int,
        seed: int,
        batch_size: int,
        inputs: Mapping[str, Any] | None,
        target: Target | None = None,
        reference: Callable[[], Images] | None = None,
        progress: bool = True,
    ) -> None:
        if metric not in METRICS:
            raise OctavoError(f"metric: {metric!r} is not one of {', '.join(METRICS)}")
        self.metric, self._target, self._reference = metric, target, reference
        self._settings: dict[str, Any] = {
            "seed": seed + IMAGE_STREAM,
            "batch_size": batch_size,
            "inputs": inputs,
        }
        self._num_images, self._progress = num_images, progress
        self._path = folder / SCORES
        self._scores = _read(self._path)
        self._images: Images | None = None

    def __call__(self, pipeline: DiffusionPipeline, steps: int, label: str = "sample") -> float:
        name = f"{self.metric} {self._num_images} {job_name(pipeline, steps=steps, **self._settings)}"
        if name not in self._scores:
            self._scores[name] = self._measure(self.sampled(pipeline, steps, label))
            write_json(self._path, self._scores)
        return self._scores[name]

    def badness(self, score: float) -> float:
        """The score, or its negative where more is better."""
        return score if self.metric == "fd" else -score

    def sampled(self, pipeline: DiffusionPipeline, steps: int, label: str = "sample") -> Images:
        return generate(
            pipeline, self._num_images, steps=steps, progress=self._progress, label=label, **self._settings
        )

    def _measure(self, images: Images) -> float:
        if self.metric == "fd":
            assert self._target is not None and self._target.statistics is not None
            features = extract(self._target.extractor, to_uint8(images)).pooled
            return frechet_distance(features, self._target.statistics)
        assert self._reference is not None
        if self._images is None:
            self._images = self._reference()
        return float(np.minimum(psnr(images, self._images), 100.0).mean())


def _read(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    scores = read_json(path)
    if not isinstance(scores, dict) or not all(type(score) is float for score in scores.values()):
        raise OctavoError(f"{path}: not readable as scores; delete it and start again")
    return scores

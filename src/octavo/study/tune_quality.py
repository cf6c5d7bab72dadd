"""How good a choice is, as one number from images of the same noise for all: FD, or PSNR to the reference's images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.errors import OctavoError
from octavo.evaluation.features import extract
from octavo.evaluation.frechet import frechet_distance
from octavo.evaluation.generate import Images, to_uint8
from octavo.evaluation.shards import generate_shards, job_name
from octavo.evaluation.similarity import psnr
from octavo.evaluation.target import Target
from octavo.files import read_json, write_json

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

OnImages = Callable[[int], Any]
METRICS = ("fd", "psnr")
SCORES = "scores.json"
IMAGE_STREAM = 5 << 28
"""Added to the seeds of the images that choices are made by, so that the winner is verified on others."""


class Quality:
    """Pipeline and steps => FD to the target's statistics, or mean PSNR in dB to the reference's images.

    fd    less is better; images as 8-bit pixels through the target's features.
    psnr  more is better; only between samplers that make the same image of the same noise (ODE solvers), and images
          that are equal count as 100 dB.

    target     features and statistics, for fd.
    reference  for psnr the pipeline and its steps that images are compared with; its images stay in `folder`.

    Every score is kept in `folder` under the name of all that decides it, what it is measured against among that: none
    is measured twice, and none is taken for another's. A killed one goes on after its last whole batch. Raises
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
        reference: tuple[DiffusionPipeline, int] | None = None,
    ) -> None:
        if metric not in METRICS:
            raise OctavoError(f"metric: {metric!r} is not one of {', '.join(METRICS)}")
        self.metric, self._target, self._reference = metric, target, reference
        self._settings: dict[str, Any] = {
            "seed": seed + IMAGE_STREAM,
            "batch_size": batch_size,
            "inputs": inputs,
        }
        self._num_images, self._folder = num_images, folder
        self._path = folder / SCORES
        self._scores = _read(self._path)
        self._images: Images | None = None
        if metric == "fd":
            assert target is not None
            self._against = target.name
        else:
            assert reference is not None
            self._against = job_name(reference[0], steps=reference[1], **self._settings)

    def __call__(
        self, pipeline: DiffusionPipeline, steps: int, on_images: OnImages = lambda count: None
    ) -> float:
        """`on_images(n)` is called after every n images that are made, whole batches; none if the score is known."""
        name = f"{self.metric} {self._num_images} {self._against} "
        name += job_name(pipeline, steps=steps, **self._settings)
        if name not in self._scores:
            self._scores[name] = self._measure(pipeline, steps, on_images)
            write_json(self._path, self._scores)
        return self._scores[name]

    def make_reference(self, on_images: OnImages = lambda count: None) -> None:
        """The images that psnr compares with, made now rather than at the first score."""
        if self._images is None:
            assert self._reference is not None
            self._images = self._sampled(*self._reference, on_images, keep=True)

    def badness(self, score: float) -> float:
        """The score, or its negative where more is better."""
        return score if self.metric == "fd" else -score

    def _measure(self, pipeline: DiffusionPipeline, steps: int, on_images: OnImages) -> float:
        if self.metric == "fd":
            assert self._target is not None and self._target.statistics is not None
            images = self._sampled(pipeline, steps, on_images)
            features = extract(self._target.extractor, to_uint8(images)).pooled
            return frechet_distance(features, self._target.statistics)
        self.make_reference()
        assert self._images is not None
        images = self._sampled(pipeline, steps, on_images)
        return float(np.minimum(psnr(images, self._images), 100.0).mean())

    def _sampled(
        self, pipeline: DiffusionPipeline, steps: int, on_images: OnImages, *, keep: bool = False
    ) -> Images:
        store = generate_shards(
            pipeline,
            self._num_images,
            steps=steps,
            workdir=self._folder,
            progress=False,
            on_images=on_images,
            **self._settings,
        )
        images = store.images()
        if not keep:
            store.remove()
        return images


def _read(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    scores = read_json(path)
    if not isinstance(scores, dict) or not all(type(score) is float for score in scores.values()):
        raise OctavoError(f"{path}: not readable as scores; delete it and start again")
    return scores

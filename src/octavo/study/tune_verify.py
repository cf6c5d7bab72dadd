"""A choice held against the reference once more, on images that nothing was chosen by, in Frechet distance."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo.errors import OctavoError
from octavo.evaluation.features import extract, identity
from octavo.evaluation.frechet import frechet_difference, frechet_estimate
from octavo.evaluation.generate import to_uint8, whole_batches
from octavo.evaluation.shards import generate_shards, job_name
from octavo.evaluation.target import Target
from octavo.files import atomic_path
from octavo.study.tune_options import Goal
from octavo.study.tune_spending import Spending

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

VERIFY_STREAM = 6 << 28
"""Added to the seeds of the images of a verification."""
VERIFY_AT_MOST = 3
"""Choices that are verified, one after the other, until one holds."""


class Verification:
    """Pipeline, steps, evaluations an image => FD of it and of the reference, their paired difference, the verdict.

    The verdict, "verified", is False where the 95 % interval says that what was asked for does not hold: of the
    difference, wholly above 0, where the reference's own FD was asked for; of the FD, wholly above the number that
    was. None where a time was asked for, which promises no quality.

    reference    the full-precision pipeline, its steps, and its evaluations an image.
    Features are kept in `folder` under the name of all that decides them, so that no image is made twice; a killed one
    goes on after its last whole batch. Raises `OctavoError` for a damaged file.
    """

    def __init__(
        self,
        goal: Goal,
        target: Target,
        reference: tuple[DiffusionPipeline, int, int],
        folder: Path,
        *,
        num_images: int,
        seed: int,
        batch_size: int,
        inputs: Mapping[str, Any] | None,
        spending: Spending,
    ) -> None:
        assert target.statistics is not None
        self._goal, self._target, self._real = goal, target, target.statistics
        self._reference, self._folder, self._spending = reference, folder, spending
        self._num_images = num_images
        self._settings: dict[str, Any] = {
            "seed": seed + VERIFY_STREAM,
            "batch_size": batch_size,
            "inputs": inputs,
        }

    def __call__(self, pipeline: DiffusionPipeline, steps: int, evaluations: int) -> dict[str, Any]:
        theirs = self._features(*self._reference, "verify, reference")
        ours = self._features(pipeline, steps, evaluations, "verify")
        distance = frechet_estimate(ours, self._real)
        difference = frechet_difference(ours, theirs, self._real, paired=True)
        verified: bool | None = None
        if self._goal.kind == "quality":
            asked = self._goal.value
            verified = not (difference.low > 0 if asked is None else distance.low > asked)
        return {
            "num_images": self._num_images,
            "fd": distance.as_json(),
            "fd_reference": frechet_estimate(theirs, self._real).as_json(),
            "difference": difference.as_json(),
            "reference_steps": self._reference[1],
            "verified": verified,
        }

    def _features(self, pipeline: DiffusionPipeline, steps: int, evaluations: int, label: str) -> Tensor:
        job = job_name(pipeline, steps=steps, **self._settings)
        name = f"{identity(self._target.extractor)}\0{self._num_images}\0{job}"
        path = self._folder / f"features-{hashlib.sha256(name.encode()).hexdigest()[:16]}.safetensors"
        count = whole_batches(self._num_images, self._settings["batch_size"])
        with self._spending.stage("verification", count * evaluations, label) as advance:
            if path.is_file():
                return _load(path)
            made = generate_shards(
                pipeline,
                self._num_images,
                steps=steps,
                workdir=self._folder,
                progress=False,
                on_images=lambda images: advance(images * evaluations),
                **self._settings,
            )
            pooled = extract(self._target.extractor, to_uint8(made.images())).pooled.contiguous()
            with atomic_path(path) as temporary:
                save_file({"pooled": pooled}, temporary)
            made.remove()
            return pooled


def _load(path: Path) -> Tensor:
    try:
        return load_file(path)["pooled"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise OctavoError(f"{path}: not readable as features; delete it and start again") from error

"""Where a calibration keeps its work in progress, so that a killed one can go on and no two mix."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.calibration.recipe import PTQ4DM
from octavo.files import cache_folder
from octavo.fingerprint import pipeline_fingerprint, versions
from octavo.work import held

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FORMAT = 2
"""Raised when a change of how pairs are made makes stored ones stale."""
VERSIONS = ("octavo", "torch", "diffusers", "numpy")


def job_name(
    pipeline: DiffusionPipeline, recipe: PTQ4DM, seed: int, batch_size: int, inputs: Mapping[str, Any] | None
) -> str:
    """SHA-256 (32 hex digits) of everything that decides the calibration pairs and what is observed on them.

    That is every network of the pipeline, its scheduler, the sampling part of the recipe, seed, batch size, inputs
    and library versions, but not bits, metric or layer patterns: after a mistake in those, the pairs still serve.
    """
    sampling = [recipe.distribution.to_dict(), recipe.samples, recipe.steps, recipe.pairs_per_trajectory]
    decisions = [FORMAT, sampling, seed, batch_size, list(versions(*VERSIONS).values())]
    return pipeline_fingerprint(pipeline, decisions, inputs)


@contextmanager
def job_folder(workdir: str | os.PathLike[str] | None, name: str) -> Iterator[Path]:
    """The job's folder, made if need be, held by this process alone; removed when the block ends without an error.

    Raises `OctavoError` while another process works on the same job.
    """
    folder = job_path(workdir, name)
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder, taken(folder)):
        yield folder
        shutil.rmtree(folder)


def job_path(workdir: str | os.PathLike[str] | None, name: str) -> Path:
    """Where the job of that name has its folder."""
    return (Path(workdir) if workdir else cache_folder() / "calibration") / name


def taken(folder: Path) -> str:
    """What is said while another process works on the same job."""
    return f"{folder}: another process is calibrating the same; wait for it"

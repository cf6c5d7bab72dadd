"""Where a calibration keeps its work in progress, so that a killed one can go on and no two mix."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from octavo.calibration.recipe import PTQ4DM
from octavo.files import cache_folder
from octavo.fingerprint import fingerprint
from octavo.work import digest_value, held

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

VERSIONS = ("octavo", "torch", "diffusers", "numpy")


def job_name(
    pipeline: DiffusionPipeline, recipe: PTQ4DM, seed: int, batch_size: int, inputs: Mapping[str, Any] | None
) -> str:
    """SHA-256 (32 hex digits) of everything that decides the calibration pairs and what is observed on them.

    That is every network of the pipeline, its scheduler, the sampling part of the recipe, seed, batch size, inputs
    and library versions, but not bits, metric or layer patterns: after a mistake in those, the pairs still serve.
    """
    scheduler = pipeline.scheduler
    sampling = [recipe.distribution.to_dict(), recipe.samples, recipe.steps, recipe.pairs_per_trajectory]
    names = [f"{type(part).__module__}.{type(part).__qualname__}" for part in (pipeline, scheduler)]
    versions = [importlib.metadata.version(name) for name in VERSIONS]
    settings = {key: value for key, value in dict(scheduler.config).items() if key[:1] != "_"}
    described = [names, settings, sampling, seed, batch_size, versions]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=repr).encode())
    for name, component in sorted(pipeline.components.items()):
        if isinstance(component, nn.Module):
            digest.update(f"{name} {fingerprint(component)}".encode())
    digest_value(digest, dict(inputs or {}), "inputs")
    return digest.hexdigest()[:32]


@contextmanager
def job_folder(workdir: str | os.PathLike[str] | None, name: str) -> Iterator[Path]:
    """The job's folder, made if need be, held by this process alone; removed when the block ends without an error.

    Raises `OctavoError` while another process works on the same job.
    """
    folder = (Path(workdir) if workdir else cache_folder() / "calibration") / name
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder, f"{folder}: another process is calibrating the same; wait for it"):
        yield folder
        shutil.rmtree(folder)

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

import numpy as np
import torch
from PIL import Image
from torch import nn

from octavo.calibration.recipe import PTQ4DM
from octavo.errors import OctavoError
from octavo.files import cache_folder
from octavo.fingerprint import fingerprint

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LOCK = ".lock"
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
    _digest_value(digest, dict(inputs or {}), "inputs")
    return digest.hexdigest()[:32]


@contextmanager
def job_folder(workdir: str | os.PathLike[str] | None, name: str) -> Iterator[Path]:
    """The job's folder, made if need be, held by this process alone; removed when the block ends without an error.

    Raises `OctavoError` while another process works on the same job.
    """
    folder = (Path(workdir) if workdir else cache_folder() / "calibration") / name
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder / LOCK):
        yield folder
        shutil.rmtree(folder)


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold a lock that the system lets go of when the process dies, however it dies."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with open(path, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OctavoError(
                f"{path.parent}: another process is calibrating the same; wait for it"
            ) from error
        yield


def _digest_value(digest: Any, value: Any, path: str) -> None:
    """Feed a value's kind and whole contents to `digest`. Raises `OctavoError` for what has no stable contents."""
    digest.update(f"{path} {type(value).__name__}\0".encode())
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            _digest_value(digest, value[key], f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _digest_value(digest, item, f"{path}.{i}")
    elif isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
    elif isinstance(value, Image.Image):
        digest.update(f"{value.mode} {value.size}".encode() + value.tobytes())
    elif value is None or isinstance(value, (bool, int, float, str)):
        digest.update(repr(value).encode())
    else:
        raise OctavoError(
            f"{path}: a {type(value).__name__} has no contents to tell it by; give tensors or numbers"
        )

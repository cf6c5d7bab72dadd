"""Where a calibration keeps its work in progress, so that a killed one can go on and no two mix."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from octavo.calibration.recipe import PTQ4DM
from octavo.diffusion import find_denoiser
from octavo.errors import OctavoError
from octavo.files import cache_folder
from octavo.fingerprint import pipeline_fingerprint, versions
from octavo.work import held

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FORMAT = 3
"""Raised when a change of how pairs are made, or of what is kept of a killed run besides, makes stored work stale."""
VERSIONS = ("octavo", "torch", "diffusers", "numpy")
_KEPT: ContextVar[list[Path] | None] = ContextVar("kept", default=None)


def job_name(
    pipeline: DiffusionPipeline, recipe: PTQ4DM, seed: int, batch_size: int, inputs: Mapping[str, Any] | None
) -> str:
    """SHA-256 (32 hex digits) of everything that decides the calibration pairs and what is observed on them.

    That is every network of the pipeline, its scheduler, the sampling part of the recipe, seed, batch size, inputs,
    library versions, the device, the processor's instructions and the number of torch's threads, by which sums are
    split and so rounded; but not bits, metric or layer patterns: after a mistake in those, the pairs still serve.
    """
    sampling = [recipe.distribution.to_dict(), recipe.samples, recipe.steps, recipe.pairs_per_trajectory]
    machine = [*versions(*VERSIONS).values(), torch.backends.cpu.get_cpu_capability()]
    machine.append(str(torch.get_num_threads()))
    device = next((tensor.device for tensor in find_denoiser(pipeline)[1].parameters()), torch.device("cpu"))
    if device.type != "cpu":
        machine.append(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)
    decisions = [FORMAT, sampling, seed, batch_size, machine]
    return pipeline_fingerprint(pipeline, decisions, inputs)


@contextmanager
def job_folder(workdir: str | os.PathLike[str] | None, name: str) -> Iterator[Path]:
    """The job's folder, made if need be, held by this process alone; removed when the block ends without an error.

    Within `work_kept` it is removed later. Raises `OctavoError` while another process works on the same job.
    """
    folder = job_path(workdir, name)
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder, taken(folder)):
        yield folder
        kept = _KEPT.get()
        if kept is None:
            shutil.rmtree(folder)
        else:
            kept.append(folder)


@contextmanager
def work_kept() -> Iterator[None]:
    """Finished jobs keep their folder until the block ends, and keep it for good when it raises.

    For a command that has yet to save what was calibrated: when the disk is full by then, an error tells where the work
    lies, and the same command again takes minutes less.
    """
    kept: list[Path] = []
    token = _KEPT.set(kept)
    try:
        yield
    except OctavoError as error:
        if not kept:
            raise
        raise OctavoError(
            f"{error}; the calibration is kept in {kept[-1]}, and the same command goes on from it"
        ) from error
    finally:
        _KEPT.reset(token)
    for folder in kept:
        with suppress(OctavoError, FileNotFoundError), held(folder, "held"):
            shutil.rmtree(folder)


def job_path(workdir: str | os.PathLike[str] | None, name: str) -> Path:
    """Where the job of that name has its folder."""
    return (Path(workdir) if workdir else cache_folder() / "calibration") / name


def taken(folder: Path) -> str:
    """What is said while another process works on the same job."""
    return f"{folder}: another process is calibrating the same; wait for it"

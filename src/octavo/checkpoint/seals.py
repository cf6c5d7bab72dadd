"""Digests of what lies beside the tensors: the network's configuration and the pipeline's other files.

One digit changed in a schedule's betas gives other images and no error. So a saved pipeline keeps, in the quantized
component's `quantization_config`, a SHA-256 of every other file; JSON by its contents, whatever its layout.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from octavo.checkpoint.strict import read_strict
from octavo.errors import OctavoError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
BY_CONTENTS = ("config.json", "model_index.json", "scheduler_config.json")


def digest_of_network(config: Mapping[str, Any]) -> str:
    """SHA-256 of a network's configuration as `config.json` holds it, without `quantization_config`."""
    rest = {key: value for key, value in config.items() if key != "quantization_config"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, of `BY_CONTENTS` of the values in it. Reads a piece at a time."""
    if path.name in BY_CONTENTS:
        with suppress(OctavoError):  # what is no strict JSON counts by its bytes
            value = read_strict(path, infinities=True)
            return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seals_of(folder: Path, component: str) -> dict[str, str]:
    """Path within the pipeline's folder -> digest, of all files but those of `component` and plain text for people."""
    return {
        path.relative_to(folder).as_posix(): digest_of_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".md" and path.relative_to(folder).parts[0] != component
    }


def check_seals(folder: Path, seals: Mapping[str, str]) -> None:
    """Raise `OctavoError` if a file that is there is not the one that was saved.

    One that is not there may not have been downloaded, because another component takes its place.
    """
    check_nothing_else(folder, seals)
    for name, digest in seals.items():
        path = folder / name
        if path.is_file() and digest_of_file(path) != digest:
            raise OctavoError(
                f"{path}: is not what Octavo saved (digest differs); save or download the model again"
            )


def is_pickled(path: Path) -> bool:
    """Whether `path` is named as pickled weights are, or as the index of their shards.

    >>> [is_pickled(Path(name)) for name in ("model.bin", "model.bin.index.json", "model.safetensors.index.json")]
    [True, True, False]
    """
    name = path.name.lower()
    return name.endswith(PICKLES) or ("index" in name and any(f"{suffix}." in name for suffix in PICKLES))


def check_no_pickles(folder: Path) -> None:
    """Raise `OctavoError` if there are pickled weights anywhere in `folder`, whatever is beside them."""
    for path in sorted(folder.rglob("*")):
        if is_pickled(path):
            raise OctavoError(
                f"{path}: pickled weights can run code, and Octavo saves safetensors alone; remove it, or save or "
                "download the model again"
            )


def check_nothing_else(folder: Path, seals: Mapping[str, str]) -> None:
    """Raise `OctavoError` if sealed weights are missing, or if a sealed component has a file that Octavo did not save.

    Any of these may be loaded instead, or too, by its mere name: a variant's weights, an adapter's configuration, a
    vocabulary. Text for people (`.md`) and hidden files are never loaded. The denoiser's tensors have a digest of their
    own. Of a component whose folder is not there (it was not downloaded, for another takes its place) nothing is
    missing.
    """
    for name in seals:
        path = folder / name
        if path.suffix == ".safetensors" and path.parent.is_dir() and not path.is_file():
            raise OctavoError(f"{path}: missing from the checkpoint; save or download it again")
    for component in sorted({name.partition("/")[0] for name in seals if "/" in name}):
        for path in sorted((folder / component).rglob("*")):
            harmless = path.is_dir() or path.suffix == ".md" or path.name.startswith(".")
            if not harmless and path.relative_to(folder).as_posix() not in seals:
                raise OctavoError(
                    f"{path}: is not among what Octavo saved; remove it, or save or download the model again"
                )

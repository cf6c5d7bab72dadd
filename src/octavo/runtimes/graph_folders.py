"""Where an engine's graphs of a network are kept: a folder for each version and processor that they were made for."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path

import torch

from octavo.fingerprint import versions

logger = logging.getLogger(__name__)
LIBRARIES = ("octavo", "diffusers")
"""By other versions of these, and of torch, a network may compute otherwise, or be converted otherwise."""


def graph_folder(cache: Path, contents: str, made_for: Iterable[str]) -> Path:
    """The folder in `cache` for graphs of the network `contents` names; it is not created.

    made_for  what else they depend on than the network, LIBRARIES and torch: an engine's version, the processor
    """
    texts = (*versions(*LIBRARIES).values(), torch.__version__, *made_for)
    return cache / f"{contents}-{hashlib.sha256(chr(0).join(texts).encode()).hexdigest()[:16]}"


def tell_of_others(folder: Path) -> None:
    """Log a warning where `folder` is not there, but one of the same network for another version or processor is.

    Not found are those of versions that describe the network otherwise (another setting in its configuration, say).
    """
    if folder.exists():
        return
    others = sorted(folder.parent.glob(f"{folder.name.rpartition('-')[0]}-*"))
    if others:
        logger.warning(
            "%s: is of another version or processor; the graphs are made anew, in a folder of their own beside it",
            others[0],
        )

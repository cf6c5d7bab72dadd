"""Where an engine's graphs of a network are kept: a folder for each version and processor that they were made for."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path

from octavo.fingerprint import versions

logger = logging.getLogger(__name__)
LIBRARIES = ("octavo", "diffusers", "torch")
"""Of other versions a network may compute otherwise, or be converted otherwise."""


def graph_folder(cache: Path, contents: str, made_for: Iterable[str]) -> Path:
    """The folder in `cache` for graphs of the network `contents` names; it is not created.

    made_for  what they depend on besides the network and LIBRARIES: an engine's version, what the processor can do.
    """
    texts = (*versions(*LIBRARIES).values(), *made_for)
    return cache / f"{contents}-{hashlib.sha256(chr(0).join(texts).encode()).hexdigest()[:16]}"


def tell_of_others(folder: Path) -> None:
    """Log a warning where `folder` is not there, but one of the same network for another version or processor is."""
    if folder.exists():
        return
    others = sorted(folder.parent.glob(f"{folder.name.rpartition('-')[0]}-*"))
    if others:
        logger.warning(
            "%s: is of another version or processor; the graphs are made anew, in a folder of their own beside it",
            others[0],
        )

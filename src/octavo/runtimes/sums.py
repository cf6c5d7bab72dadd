"""Sums of a cached graph's files: what a disk or a hand did to them is seen before they are computed with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

SUMS = "sums.json"


def write_sums(folder: Path) -> None:
    """Write `sums.json` beside the files in `folder`: name -> BLAKE2b of its contents (RFC 7693), 16 bytes in hex."""
    (folder / SUMS).write_text(json.dumps(_sums(folder), indent=1))


def is_intact(folder: Path) -> bool:
    """Whether the files in `folder` are those that its `sums.json` was written for. A second for a gigabyte.

    This tells damage. It tells nothing of who wrote the files: the cache is the user's own.
    """
    try:
        return bool(json.loads((folder / SUMS).read_text()) == _sums(folder))
    except (OSError, ValueError):
        return False


def _sums(folder: Path) -> dict[str, str]:
    sums = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != SUMS:
            with path.open("rb") as file:
                sums[path.name] = hashlib.file_digest(file, _digest).hexdigest()
    return sums


def _digest() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=16)

"""Work in progress on disk: held by one process alone, and named by the contents of what decides it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from octavo.errors import OctavoError

LOCK = ".lock"


@contextmanager
def held(folder: Path, message: str) -> Iterator[None]:
    """Hold `folder` by a lock that the system lets go of when the process dies, however it dies.

    Raises `OctavoError(message)` while another process holds it. Where the system has no such locks (Windows),
    nothing is held.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(folder / LOCK, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OctavoError(message) from error
        yield


def digest_value(digest: Any, value: Any, path: str) -> None:
    """Feed a value's kind and whole contents to `digest` (of hashlib); `path` names it.

    Raises `OctavoError` for what has no stable contents: anything but numbers, texts, tensors, arrays, images and
    containers of them.
    """
    digest.update(f"{path} {type(value).__name__}\0".encode())
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest_value(digest, value[key], f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            digest_value(digest, item, f"{path}.{i}")
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

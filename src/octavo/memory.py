"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def give_back() -> None:
    """Let the C library return what was freed to the system; where it is not glibc, do nothing.

    glibc keeps freed blocks of up to 32 MiB for the next request, and what lies between blocks in use stays resident:
    half a gigabyte in the calibration of a large network, on top of what its next stage takes. Milliseconds.

    >>> give_back()
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # TypeError: Windows has no library of the process itself
        return None
    return found

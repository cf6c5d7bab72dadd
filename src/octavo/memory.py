"""Memory: what was freed given back to the system, pages of files let go, and how much there is."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch

LEAST_BYTES = 2**20
"""Smaller tensors are left where they are: to ask costs more than they take."""
CGROUP = Path("/sys/fs/cgroup")
"""Where a process in a container finds its own limits (version 2)."""
_PAGEOUT = 21  # MADV_PAGEOUT of Linux 5.4, which Python's `mmap` does not know


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


def let_go(tensors: Iterable[torch.Tensor]) -> None:
    """Take pages of mapped files that hold `tensors` out of memory; the next use reads them from the file again.

    Weights that diffusers loads from safetensors are such pages. Values stay what they are, also those that were
    written to: such pages are not the file's any more. On systems other than Linux, and of pages that another process
    maps as well, nothing happens.

    >>> x = torch.ones(2**20)
    >>> let_go([x])
    >>> bool((x == 1).all())
    True
    """
    large = [x for x in tensors if x.device.type == "cpu" and x.nbytes >= LEAST_BYTES and x.is_contiguous()]
    if not large or not sys.platform.startswith("linux"):
        return
    mapped = _mapped_files()
    for tensor in large:
        first, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if any(low <= first and end <= high for low, high in mapped):
            start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
            length = end // mmap.PAGESIZE * mmap.PAGESIZE - start
            _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _PAGEOUT)


def available() -> int | None:
    """Bytes that the system can give without swapping, within the limit of the container; None where it does not tell.

    >>> bytes_there = available()
    >>> bytes_there is None or bytes_there > 0
    True
    """
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        there = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        with suppress(OSError, ValueError):  # no cgroup, or "max"
            limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
            statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
            there = min(there, limit - used + int(statistics.get("file", 0)))  # files' pages are given up
        return max(0, there)
    return None


def _mapped_files() -> list[tuple[int, int]]:
    """Addresses at which this process has files."""
    with suppress(OSError, ValueError):
        lines = (line.split() for line in Path("/proc/self/maps").read_text().splitlines())
        ends = (line[0].split("-") for line in lines if len(line) > 5 and line[5].startswith("/"))
        return [(int(low, 16), int(high, 16)) for low, high in ends]
    return []


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)

"""One random generator for each image, so that image k is the same whatever it is batched with."""

from __future__ import annotations

import torch

from octavo.errors import OctavoError


def generators(seed: int, start: int, count: int) -> list[torch.Generator]:
    """CPU generators of the images start..start+count-1; image k is seeded with seed + k alone.

    They live on the CPU even for a pipeline on a GPU: diffusers then draws on the CPU and moves the noise, so
    the same image comes from the same noise on every device. Raises OctavoError if a number is negative, or if a
    seed reaches 2^32: torch's CPU generator reads the lower 32 bits only, and images would repeat.

    >>> [generator.initial_seed() for generator in generators(seed=7, start=2, count=3)]
    [9, 10, 11]
    """
    for argument, value in (("seed", seed), ("start", start), ("count", count)):
        if value < 0:
            raise OctavoError(f"{argument}: {value} is negative")
    if seed + start + count > 2**32:
        raise OctavoError(
            f"seed: {seed + start + count - 1} is not below 2^32, where torch's CPU noise repeats"
        )
    return [torch.Generator().manual_seed(seed + start + k) for k in range(count)]


def check_seed(seed: int, stream: int, count: int) -> None:
    """Raise OctavoError for a seed whose `count` images, seeded from seed + `stream` on, `generators` would refuse.

    >>> check_seed(2**31, stream=3 << 30, count=64)
    Traceback (most recent call last):
        ...
    octavo.errors.OctavoError: seed: 2147483648 is not a whole number from 0 to 1073741760
    """
    most = 2**32 - stream - count
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= most:
        raise OctavoError(f"seed: {seed!r} is not a whole number from 0 to {most}")

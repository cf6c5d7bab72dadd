"""One random generator for each image, so that image k is the same whatever it is batched with."""

from __future__ import annotations

import torch

from octavo.errors import OctavoError


def generators(seed: int, start: int, count: int) -> list[torch.Generator]:
    """CPU generators of the images start..start+count-1; image k is seeded with seed + k alone.

    They live on the CPU even for a pipeline on a GPU: diffusers then draws on the CPU and moves the noise, so
    the same image comes from the same noise on every device. Raises OctavoError if a number is negative.

    >>> [generator.initial_seed() for generator in generators(seed=7, start=2, count=3)]
    [9, 10, 11]
    """
    for argument, value in (("seed", seed), ("start", start), ("count", count)):
        if value < 0:
            raise OctavoError(f"{argument}: {value} is negative")
    return [torch.Generator().manual_seed(seed + start + k) for k in range(count)]

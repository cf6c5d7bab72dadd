"""How a product is cut for the GPU's processors: the tile of a program, its warps, and programs that share a tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tile:
    """A program's part of a product: M rows, N columns, K of the depth at a time; integers come out the same by any.

    `split`: so many programs share a tile's sums. `abreast`: so many tiles of rows go through the columns together.
    """

    m: int
    n: int
    k: int
    split: int = 1
    abreast: int = 8
    warps: int = 4
    stages: int = 3

    @property
    def options(self) -> dict[str, Any]:
        """How its kernel is compiled. Products and sums are never contracted into one operation."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}

    def programs(self, rows: int, columns: int) -> int:
        """Tiles of a product."""
        return -(-rows // self.m) * -(-columns // self.n)


def chosen(rows: int, columns: int, depth: int, taps: int, processors: int) -> Tile:
    """The tile for `[rows, depth] x [depth, columns]`, the depth read `taps` times over (a convolution's kernel).

    The largest of a few that gives each of the GPU's processors one; where not even the smallest does, programs share
    tiles, as far as each is left four steps of K. Not yet chosen by measurement (`benchmarks/cuda_tiles.py`).

    >>> chosen(65536, 128, 128, 9, 132)
    Tile(m=128, n=128, k=128, split=1, abreast=8, warps=8, stages=3)
    >>> chosen(64, 256, 512, 9, 132).split
    8
    """
    k = next((k for k in (128, 64) if depth % k == 0), min(64, power(depth, 32)))  # loads without a mask
    m = n = 0
    for m, n in ((128, 128), (128, 64), (64, 64), (64, 32), (32, 32)):
        m, n = min(m, power(rows, 16)), min(n, power(columns, 16))
        if -(-rows // m) * -(-columns // n) >= processors:
            break
    steps, tiles, split = taps * -(-depth // k), -(-rows // m) * -(-columns // n), 1
    while steps >= 8 * split and 2 * tiles * split <= processors:
        split *= 2
    return Tile(m, n, k, split, warps=8 if m * n >= 128 * 128 else 4)


def power(number: int, least: int) -> int:
    """The power of two from `number` on, and from `least` on."""
    return max(least, 1 << (number - 1).bit_length())

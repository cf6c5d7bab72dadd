"""Which tile is fastest for which product on this GPU: each one's time, and what `octavo.runtimes.cuda.tiles` chooses.

python benchmarks/cuda_tiles.py             # 15 processes compile first, then one measures

Each time is of COPIES launches in a CUDA graph, over that number, the median of ROUNDS replays; what they read fits the
cache, as between a network's layers. All tiles of a product must give the same bits.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import peers
import torch

from octavo.fingerprint import versions
from octavo.runtimes.cuda import launch
from octavo.runtimes.cuda.tiles import Tile, chosen

COPIES, ROUNDS = 10, 5
TILES = [
    Tile(128, 256, 128, 1, 8, 8, 3),
    Tile(256, 128, 128, 1, 8, 8, 3),
    Tile(128, 256, 64, 1, 8, 8, 4),
    Tile(128, 128, 128, 1, 8, 8, 3),
    Tile(128, 128, 128, 1, 8, 4, 3),
    Tile(128, 128, 64, 1, 8, 8, 4),
    Tile(128, 128, 64, 1, 8, 4, 4),
    Tile(128, 64, 128, 1, 8, 4, 3),
    Tile(128, 64, 64, 1, 8, 4, 4),
    Tile(64, 128, 128, 1, 8, 4, 4),
    Tile(64, 128, 64, 1, 8, 4, 4),
    Tile(64, 64, 128, 1, 8, 4, 4),
    Tile(64, 64, 64, 1, 8, 4, 5),
    Tile(64, 32, 128, 1, 8, 4, 4),
    Tile(32, 64, 128, 1, 8, 4, 4),
    Tile(32, 32, 128, 1, 8, 4, 5),
    Tile(16, 64, 128, 1, 8, 4, 5),
    Tile(16, 32, 128, 1, 8, 2, 5),
]


@dataclass(frozen=True)
class Product:
    """`size` > 1: a 3x3 convolution of images `size` x `size`; else a product of `images` rows."""

    images: int
    size: int
    channels: int
    columns: int

    @property
    def rows(self) -> int:
        return self.images * self.size * self.size

    @property
    def taps(self) -> int:
        return 9 if self.size > 1 else 1

    @property
    def chosen(self) -> Tile:
        processors = launch.processors(torch.device("cuda"))
        return chosen(self.rows, self.columns, self.channels, self.taps, processors)

    def kind(self, tile: Tile) -> tuple[Any, ...]:
        """What is compiled for it: Triton tells numbers that 16 divides from others."""
        of_16 = (number % 16 == 0 for number in (self.rows, self.size, self.channels, self.columns))
        return self.taps, repr(tile), self.channels % tile.k == 0, *of_16

    def runner(self) -> Callable[[Tile | None], torch.Tensor]:
        drawn = torch.Generator("cuda").manual_seed(0)

        def int8(*shape: int) -> torch.Tensor:
            return torch.randint(-128, 128, shape, dtype=torch.int8, device="cuda", generator=drawn)

        numbers = torch.rand(self.columns, device="cuda", generator=drawn)
        offset = torch.ones(self.columns, dtype=torch.int32, device="cuda")
        ending = (offset, numbers, numbers, None, torch.bfloat16)
        if self.size == 1:
            q, w = int8(1, self.images, self.channels), int8(self.columns, self.channels)
            return lambda tile: launch.matmul(q, w, *ending, tile=tile)
        q = int8(self.images, 1, self.size + 2, self.size + 2, self.channels)
        w, ones = int8(self.columns, 1, 3, 3, self.channels), (1, 1, 1)
        return lambda tile: launch.convolution(q, w, *ending, ones, ones, 1, tile=tile)

    def tiles(self) -> Iterator[Tile]:
        for tile in TILES:
            if tile.m > max(16, self.rows) or tile.n > max(16, self.columns):
                continue
            for split in (1, 2, 4, 8, 16):
                steps = self.taps * -(-self.channels // tile.k)
                if split == 1 or (
                    tile.programs(self.rows, self.columns) * split <= 300 and steps >= 2 * split
                ):
                    yield Tile(tile.m, tile.n, tile.k, split, tile.abreast, tile.warps, tile.stages)


CIFAR = [
    Product(batch, size, channels, columns)
    for batch in (64, 8, 1)
    for size, channels, columns in (
        (32, 128, 128),
        (16, 256, 256),
        (16, 512, 256),
        (8, 256, 256),
        (4, 512, 256),
    )
]
SD15 = [
    Product(batch, size, channels, columns)
    for batch in (2, 8)
    for size, channels, columns in ((64, 320, 320), (32, 640, 640), (16, 1280, 1280), (8, 2560, 1280))
]
LINEAR = [
    Product(rows, 1, depth, columns)
    for rows, depth, columns in (
        (16384, 256, 256),
        (2048, 256, 256),
        (256, 256, 256),
        (64, 512, 256),
        (8192, 320, 320),
        (8192, 320, 2560),
        (8192, 1280, 320),
        (2048, 640, 5120),
        (2048, 2560, 640),
        (512, 1280, 10240),
        (512, 5120, 1280),
        (154, 768, 640),
    )
]
PRODUCTS = [*CIFAR, *SD15, *LINEAR]


def microseconds(run: Callable[[], Any]) -> float:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(COPIES):
            run()
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / COPIES)
    return statistics.median(times[1:])


def measured(product: Product) -> dict[str, Any]:
    run, times = product.runner(), {}
    expected = run(None)
    for tile in product.tiles():
        try:
            found = run(tile)
        except Exception as error:  # out of shared memory
            print(f"{product} {tile}: {str(error).splitlines()[0][:200]}")
            continue
        assert torch.equal(found, expected), f"{product} {tile}: other bits"
        times[tile] = microseconds(lambda tile=tile: run(tile))
    best = min(times, key=lambda tile: times[tile])
    own = product.chosen
    ours = microseconds(lambda: run(None))
    work = 2e-6 * product.rows * product.columns * product.channels * product.taps
    print(
        f"{product.rows:6} x {product.channels * product.taps:6} x {product.columns:6}: {times[best]:7.1f} us "
        f"{work / times[best]:7.1f} TOPS {_short(best)}; chosen {ours:7.1f} us {_short(own)}",
        flush=True,
    )
    every = [[*asdict(tile).values(), round(time, 2)] for tile, time in times.items()]
    return {"product": asdict(product), "microseconds": every, "chosen": asdict(own), "chosen_us": ours}


def _short(tile: Tile) -> str:
    return "/".join(str(v) for v in asdict(tile).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", type=int, nargs=2, metavar=("I", "N"), help="part I of N, and end")
    parser.add_argument("--processes", type=int, default=15)
    parser.add_argument("--name", default="cuda_tiles")
    options = parser.parse_args()
    pairs = [(product, tile) for product in PRODUCTS for tile in {*product.tiles(), product.chosen}]
    if options.compile:
        part, parts = options.compile
        first = {product.kind(tile): (product, tile) for product, tile in pairs}
        for kind in sorted(first, key=repr)[part::parts]:
            product, tile = first[kind]
            try:
                product.runner()(tile)
            except Exception as error:
                print(f"{product} {tile}: {str(error).splitlines()[0][:200]}")
        return
    start = time.perf_counter()
    n = options.processes
    command = [sys.executable, __file__, "--compile"]
    for process in [subprocess.Popen([*command, str(i), str(n)]) for i in range(n)]:
        process.wait()
    print(f"{len(pairs)} pairs; compiled after {time.perf_counter() - start:.0f} s", flush=True)
    results = [measured(product) for product in PRODUCTS]
    print(f"measured after {time.perf_counter() - start:.0f} s")
    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, **versions("triton")}
    peers.save(options.name, {"gpu": gpu, "products": results})


if __name__ == "__main__":
    main()

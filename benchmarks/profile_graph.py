"""Where an evaluation's time goes: OpenVINO's own counters of each kernel, summed by kind.

    python benchmarks/profile_graph.py                # DDPM CIFAR-10 U-Net, `best`, batch 8 and 1
    python benchmarks/profile_graph.py --pair-limit   # one kernel a layer on CPUs without VNNI

For every node of the compiled graph the mean of so many evaluations behind two that warm up (the engine counts means
of all so far, in whole microseconds); of a batch in parts the parts are summed, which run side by side. "products":
convolutions, linear layers, attention's two products where they are kernels of their own.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import peers
import torch

import octavo
from octavo.diffusion import first_call
from octavo.evaluation.peers.architectures import architecture
from octavo.runtimes.core import openvino_core
from octavo.runtimes.openvino import OpenVINOExecutor

WARM_UP = 2
PRODUCTS = (
    "Convolution",
    "GroupConvolution",
    "Deconvolution",
    "FullyConnected",
    "MatMul",
    "MHA",
    "ScaledDot",
)
"""What the names of kernels that multiply matrices begin with."""


class Counting:
    """OpenVINO's core, whose graphs count their kernels' time."""

    def __init__(self) -> None:
        self.core = openvino_core()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.core, name)

    def compile_model(self, model: Any, device: str, settings: dict[str, Any] | None = None) -> Any:
        return self.core.compile_model(model, device, {**(settings or {}), "PERF_COUNT": True})


def profile(quantized: Any, batch_size: int, rounds: int, cache: Path) -> dict[str, Any]:
    executor: Any = OpenVINOExecutor(quantized.unet, precision="auto", cache=cache)
    executor._core = Counting()
    _, kwargs = first_call(quantized, batch_size=batch_size)
    graph = executor.prepare(**kwargs)

    def counted() -> dict[tuple[int, str], tuple[str, str, float]]:
        return {
            (part, node.node_name): (node.node_type, node.exec_type, node.real_time.total_seconds())
            for part, request in enumerate(graph.streams.requests)
            for node in request.profiling_info
        }

    with torch.inference_mode():
        for _ in range(WARM_UP):
            executor(**kwargs)
        before = counted()
        for _ in range(rounds):
            executor(**kwargs)
    every = WARM_UP + rounds
    means = {
        key: (kind, kernel, (every * mean - WARM_UP * before[key][2]) / rounds)
        for key, (kind, kernel, mean) in counted().items()
    }
    kinds: dict[str, float] = defaultdict(float)
    kernels: dict[str, float] = defaultdict(float)
    for node_type, kernel, seconds in means.values():
        kinds[node_type] += 1000 * seconds
        kernels[f"{node_type} {kernel}"] += 1000 * seconds
    total = sum(kinds.values())
    products = sum(value for kind, value in kinds.items() if kind.startswith(PRODUCTS))
    print(
        f"\nbatch {batch_size}, {len(graph.streams.requests)} parts, {graph.precision} remainder: {total:.1f} ms"
    )
    for name, value in sorted(kernels.items(), key=lambda item: -item[1]):
        if value > 0.002 * total:
            print(f"{name:60}{value:>10.2f} ms{value / total:>8.1%}")
    print(f"products: {products / total:.1%}")
    return {
        "batch_size": batch_size,
        "parts": len(graph.streams.requests),
        "precision": graph.precision,
        "total_ms": total,
        "share_of_products": products / total,
        "ms_by_kind": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "ms_by_kernel": dict(sorted(kernels.items(), key=lambda item: -item[1])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--recipe", default="best")
    parser.add_argument("--pair-limit", action="store_true", help="one kernel a layer on CPUs without VNNI")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--name", default="profile_graph", help="of the file in results/")
    options = parser.parse_args()
    changes = {"pair_limit": True} if options.pair_limit else {}
    recipe = octavo.named_recipe(options.recipe, samples=32, steps=4, pairs_per_trajectory=4, **changes)
    quantized = octavo.quantize(architecture("ddpm-cifar10"), recipe, batch_size=8, progress=False)
    with tempfile.TemporaryDirectory() as folder:  # graphs that count are no others' cache
        results = [profile(quantized, size, options.rounds, Path(folder)) for size in options.batch_sizes]
    peers.save(options.name, {"recipe": recipe.to_dict(), "rounds": options.rounds, "results": results})


if __name__ == "__main__":
    main()

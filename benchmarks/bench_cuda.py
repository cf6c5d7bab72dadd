"""One evaluation on an NVIDIA GPU: ours against torch eager, compiled and in fp8, in turn.

python benchmarks/bench_cuda.py                                   # the CIFAR-10 U-Net, batch 64, 8, 1
python benchmarks/bench_cuda.py --architecture sd15 --size 64 --batch-sizes 8 2

An engine's turn is EVALUATIONS of them, queued one behind the other as a sampler's steps are, and the wait for the last
one; inputs are on the GPU already. torch.compile's engines have CUDA graphs, as ours has.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import torch
import torch._dynamo

import octavo
from octavo.diffusion import find_denoiser, first_call
from octavo.errors import OctavoError
from octavo.evaluation.peers.architectures import architecture
from octavo.evaluation.speed import format_table, table, take_turns
from octavo.fingerprint import versions
from octavo.runtimes import audit
from octavo.runtimes.cuda.device import compute_device

EXACT = "torch eager fp32"
BASELINE = "torch compiled bf16"
FP8 = "torch compiled bf16, linear layers in fp8"
EVALUATIONS = 10
Evaluation = Callable[[], torch.Tensor]


class Contest:
    """The engines for one batch size, compiled and captured; what could not be is named and left out."""

    def __init__(
        self,
        pipeline: Any,
        quantized: Any,
        batch_size: int,
        device: torch.device,
        options: argparse.Namespace,
    ) -> None:
        self.batch_size, self.device, self.options = batch_size, device, options
        args, kwargs = first_call(pipeline, batch_size=batch_size)
        given = [_to(value, device) for value in args], {k: _to(v, device) for k, v in kwargs.items()}
        halved = [_half(value) for value in given[0]], {k: _half(v) for k, v in given[1].items()}
        whole = copy.deepcopy(find_denoiser(pipeline)[1]).to(device).eval()
        half = copy.deepcopy(whole).to(torch.bfloat16).to(memory_format=torch.channels_last)
        self.seconds: dict[str, float] = {}
        self.distances: dict[str, float] = {}
        self.audited: dict[str, str] = {}
        self.engines: dict[str, Evaluation] = {}
        self._exact = torch.empty(0)
        self._add(EXACT, lambda: whole, given)
        self._add("torch eager bf16", lambda: half, halved)
        self._add(BASELINE, lambda: torch.compile(half, mode="reduce-overhead", dynamic=False), halved)
        if not options.without_fp8:
            self._add(
                FP8, lambda: torch.compile(_in_fp8(half), mode="reduce-overhead", dynamic=False), halved
            )
        for precision in options.precisions:

            def ours(precision: str = precision) -> Any:
                fast = octavo.accelerate(
                    quantized, runtime="torch-cuda", precision=precision, batch_size=batch_size
                )
                rows = audit(fast)
                self.audited[precision] = f"{sum(row.ok for row in rows)} of {len(rows)}"
                return find_denoiser(fast)[1]

            self._add(f"octavo int8, {precision}", ours, given)

    def _add(self, name: str, network_of: Callable[[], Any], given: tuple[list[Any], dict[str, Any]]) -> None:
        start = time.perf_counter()
        try:
            with torch.no_grad():
                network = network_of()
                evaluate = _evaluation(network, *given)
                output = evaluate().float()
                evaluate()
        except Exception as error:
            print(f"{name}: left out: {type(error).__name__}: {str(error)[:600]}", flush=True)
            return
        self.seconds[name] = time.perf_counter() - start
        self._exact = output if name == EXACT else self._exact
        self.distances[name] = float((output - self._exact).norm() / self._exact.norm())
        self.engines[name] = evaluate
        print(f"batch {self.batch_size}: {name}: ready after {self.seconds[name]:.1f} s", flush=True)

    def measured(self) -> dict[str, Any]:
        """What `rounds` turns of each engine took, and how far its output is from fp32's."""

        def turn(run: Evaluation) -> Callable[[], None]:
            def several() -> None:
                with torch.no_grad():
                    for _ in range(EVALUATIONS):
                        run()
                torch.cuda.synchronize(self.device)

            return several

        rounds = self.options.rounds
        turns = {name: turn(run) for name, run in self.engines.items()}
        rows = table(take_turns(turns, rounds=rounds, warm_up=3, rest=0), BASELINE, per=EVALUATIONS)
        print(f"\nbatch {self.batch_size}, {rounds} rounds of {EVALUATIONS} evaluations")
        print(format_table(rows, "evaluation", BASELINE))
        for name, distance in self.distances.items():
            print(f"{name}: {distance:.2e} from fp32, ready after {self.seconds[name]:.1f} s")
        print(f"layers in int8: {self.audited}", flush=True)
        if self.options.profile is not None:
            for name in (BASELINE, f"octavo int8, {self.options.precisions[-1]}"):
                if name in self.engines:
                    words = name.replace(",", "").replace(" ", "_")
                    _profile(self.engines[name], self.options.profile / f"{words}_{self.batch_size}.txt")
        figures = {"batch_size": self.batch_size, "rounds": rounds, "evaluations": EVALUATIONS}
        others = {"relative_l2_to_fp32": self.distances, "seconds_to_first": self.seconds}
        return {**figures, "engines": rows, **others, "in_int8": self.audited}


def _evaluation(network: Any, args: list[Any], kwargs: dict[str, Any]) -> Evaluation:
    def run() -> torch.Tensor:
        sample: torch.Tensor = network(*args, **{**kwargs, "return_dict": False})[0]
        return sample

    return run


def _in_fp8(network: Any) -> Any:
    """The network with its linear layers in torchao's fp8, scaled row by row. torch has no such convolution."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    narrow = copy.deepcopy(network)

    def fits(module: torch.nn.Module, _: str) -> bool:
        return (
            isinstance(module, torch.nn.Linear) and module.in_features % 16 == module.out_features % 16 == 0
        )

    quantize_(narrow, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), filter_fn=fits)
    return narrow


def _profile(run: Callable[[], Any], into: Path) -> None:
    """The kernels of three evaluations by their time on the GPU."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(3):
            run()
        torch.cuda.synchronize()
    into.write_text(
        profile.key_averages().table(sort_by="cuda_time_total", row_limit=60, max_name_column_width=90)
    )


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _half(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _half(item) for key, item in value.items()}
    if not isinstance(value, torch.Tensor) or value.ndim < 2:
        return value
    image = torch.channels_last if value.ndim == 4 else torch.preserve_format
    return value.to(torch.bfloat16, memory_format=image)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", default="ddpm-cifar10")
    parser.add_argument("--size", type=int, help="of latents, where not the architecture's own")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 8, 1])
    parser.add_argument("--precisions", nargs="+", default=["f32", "bf16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--samples", type=int, default=16, help="of calibration: speed does not depend on it")
    parser.add_argument("--profile", type=Path, help="a folder for the kernels' times")
    parser.add_argument("--without-fp8", action="store_true")
    parser.add_argument(
        "--wait-for", type=Path, help="measure only when this file is there: others compile yet"
    )
    parser.add_argument("--name", default="cuda")
    options = parser.parse_args()
    try:
        device = compute_device(torch.device("cpu"))
    except OctavoError as error:
        print(f"bench_cuda: {error}")
        return
    if device.type != "cuda":
        print(
            "bench_cuda: TRITON_INTERPRET=1 computes on the CPU, which tells nothing of speed; leave it out"
        )
        return
    torch._dynamo.config.recompile_limit = 256  # counts all networks of a class and all shapes
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.rnn.fp32_precision = "ieee"  # no TF32
    start = time.perf_counter()
    pipeline = architecture(options.architecture)
    if options.size is not None:
        find_denoiser(pipeline)[1].register_to_config(sample_size=options.size)
    recipe = octavo.PTQ4DM(samples=options.samples, steps=min(4, options.samples))
    quantized = octavo.quantize(pipeline, recipe, batch_size=min(8, options.samples), progress=False)
    print(f"quantized after {time.perf_counter() - start:.0f} s", flush=True)
    contests = [Contest(pipeline, quantized, size, device, options) for size in options.batch_sizes]
    while options.wait_for is not None and not options.wait_for.exists():
        time.sleep(0.5)
    results = [contest.measured() for contest in contests]
    gpu = {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, **versions("triton")}
    peers.save(options.name, {"architecture": options.architecture, "gpu": gpu, "results": results})


if __name__ == "__main__":
    main()

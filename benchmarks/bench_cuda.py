"""One evaluation of the DDPM CIFAR-10 U-Net on an NVIDIA GPU: ours against torch bf16, eager and compiled, in turn.

python benchmarks/bench_cuda.py             # batch 64, 8, 1; where there is no such GPU, one line says so
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import peers
import torch
from diffusers import DDIMPipeline

import octavo
from octavo.diffusion import find_denoiser, first_call
from octavo.errors import OctavoError
from octavo.evaluation.peers.architectures import architecture
from octavo.evaluation.speed import format_table, table, take_turns
from octavo.fingerprint import versions
from octavo.runtimes import audit
from octavo.runtimes.cuda.device import compute_device

BASELINE = "torch eager bf16"
COMPILED = {"torch compiled bf16": "default", "torch compiled bf16, CUDA graphs": "reduce-overhead"}


def bench(
    pipeline: DDIMPipeline, quantized: DDIMPipeline, batch_size: int, rounds: int, device: torch.device
) -> dict[str, Any]:
    """All inputs are on `device` already; an engine's turn ends when the device has done what it was asked."""
    args, kwargs = first_call(pipeline, batch_size=batch_size)
    args, kwargs = [_to(value, device) for value in args], {k: _to(v, device) for k, v in kwargs.items()}
    _, denoiser = find_denoiser(pipeline)
    whole = copy.deepcopy(denoiser).to(device).eval()
    half = copy.deepcopy(whole).to(torch.bfloat16).to(memory_format=torch.channels_last)
    networks: dict[str, Any] = {"torch eager fp32": whole, BASELINE: half}
    for name, mode in COMPILED.items() if device.type == "cuda" else ():
        networks[name] = torch.compile(half, mode=mode)
    audited = {}
    for precision in ("f32", "bf16"):
        fast = octavo.accelerate(quantized, runtime="torch-cuda", precision=precision, batch_size=batch_size)
        networks[f"octavo int8, {precision}"] = find_denoiser(fast)[1]
        rows = audit(fast)
        audited[precision] = f"{sum(row.ok for row in rows)} of {len(rows)}"

    def evaluation(name: str) -> peers.Engine:
        given = [args, kwargs]
        if networks[name] is not whole and not name.startswith("octavo"):  # bf16; the timestep stays as it is
            given = [[_half(v) for v in args], {k: _half(v) for k, v in kwargs.items()}]

        def run() -> torch.Tensor:
            sample: torch.Tensor = networks[name](*given[0], **{**given[1], "return_dict": False})[0]
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return sample

        return run

    engines = {name: evaluation(name) for name in networks}
    with torch.no_grad():
        exact = engines["torch eager fp32"]().float()
        distances = {
            name: float((run().float() - exact).norm() / exact.norm()) for name, run in engines.items()
        }
        timings = take_turns(engines, rounds=rounds, warm_up=5)
    rows = table(timings, BASELINE)
    print(f"\nbatch {batch_size}, {rounds} rounds\n{format_table(rows, 'evaluation', BASELINE)}")
    print("\n".join(f"{name}: {distance:.2e} from fp32" for name, distance in distances.items()))
    print(f"layers in int8: {audited}")
    figures = {"batch_size": batch_size, "rounds": rounds, "engines": rows}
    return {**figures, "relative_l2_to_fp32": distances, "layers_in_int8": audited}


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _half(value: Any) -> Any:
    image = isinstance(value, torch.Tensor) and value.ndim > 1
    return value.to(torch.bfloat16, memory_format=torch.channels_last) if image else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 8, 1])
    parser.add_argument("--rounds", type=int, default=15)
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
    pipeline = architecture("ddpm-cifar10")
    quantized = octavo.quantize(pipeline, octavo.PTQ4DM(samples=16, steps=4), batch_size=8, progress=False)
    results = [bench(pipeline, quantized, size, options.rounds, device) for size in options.batch_sizes]
    gpu = {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, **versions("triton")}
    peers.save("cuda", {"gpu": gpu, "results": results})


if __name__ == "__main__":
    main()

"""ONNX Runtime on the DDPM CIFAR-10 U-Net: int8 of our export over its own fp32, in turn in one process.

python benchmarks/bench_onnx.py             # batch 8, then batch 1; needs the `onnx` extra
"""

from __future__ import annotations

import argparse
import math

import peers
import torch
from diffusers import DDIMPipeline

import octavo
from octavo.diffusion import find_denoiser, first_call, first_output
from octavo.evaluation.peers.architectures import architecture
from octavo.evaluation.speed import format_table, table, take_turns
from octavo.fingerprint import versions
from octavo.runtimes import audit

BASELINE = "onnxruntime fp32"
INT8 = "onnxruntime int8 (octavo)"


def int8_pipeline(pipeline: DDIMPipeline) -> DDIMPipeline:
    """Quantized on few pairs, for its speed: random weights have no quality."""
    recipe = octavo.PTQ4DM(samples=8, steps=4, metric="minmax", symmetric=True, sub_pixel=True)
    return octavo.quantize(pipeline, recipe, batch_size=8, progress=False)


def bench(pipeline: DDIMPipeline, quantized: DDIMPipeline, batch_size: int, rounds: int) -> dict[str, object]:
    args, kwargs = first_call(pipeline, batch_size=batch_size)
    pipelines = {
        "torch eager fp32": pipeline,
        BASELINE: octavo.accelerate(pipeline, runtime="onnx", batch_size=batch_size),
        INT8: octavo.accelerate(quantized, runtime="onnx", batch_size=batch_size),
        "openvino int8 (octavo), f32": octavo.accelerate(quantized, precision="f32", batch_size=batch_size),
    }

    def evaluation(name: str) -> peers.Engine:
        _, denoiser = find_denoiser(pipelines[name])
        return lambda: first_output(denoiser(*args, **kwargs))

    engines = {name: evaluation(name) for name in pipelines}
    with torch.inference_mode():
        exact, simulated = (first_output(find_denoiser(p)[1](*args, **kwargs)) for p in (pipeline, quantized))
        distances = {name: _relative(engine(), exact) for name, engine in engines.items()}
        to_simulation = _relative(engines[INT8](), simulated)
        timings = take_turns(engines, rounds=rounds)
    rows = table(timings, BASELINE)
    ratio, low, high = timings[INT8].ratio(timings[BASELINE])
    kernels: dict[str, int] = {}
    for row in audit(pipelines[INT8]):
        kernels[f"{row.kernel} {row.precision}"] = kernels.get(f"{row.kernel} {row.precision}", 0) + 1
    print(
        f"\nDDPM CIFAR-10 U-Net, batch {batch_size}, {rounds} rounds\n{format_table(rows, 'evaluation', BASELINE)}"
    )
    print(f"int8 over fp32 on ONNX Runtime: {ratio:.2f}x ({low:.2f}-{high:.2f}); kernels {kernels}")
    for name, distance in distances.items():
        decibels = f"{-20 * math.log10(distance):.1f} dB" if distance else "0"
        print(f"  {name}: {distance:.2e} (relative L2 to torch fp32; signal over error {decibels})")
    return {
        "batch_size": batch_size,
        "rounds": rounds,
        "engines": rows,
        "int8_over_fp32": [round(x, 3) for x in (ratio, low, high)],
        "kernels": kernels,
        "relative_error_to_fp32": distances,
        "relative_error_of_simulation_to_fp32": _relative(simulated, exact),
        "relative_distance_to_simulation": to_simulation,
    }


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    pipeline = architecture("ddpm-cifar10")
    quantized = int8_pipeline(pipeline)
    results = [bench(pipeline, quantized, size, options.rounds) for size in options.batch_sizes]
    peers.save("onnx", {"onnxruntime": versions("onnxruntime", "onnx", "onnxscript"), "results": results})

"""Linear layers as convolutions of one pixel, on CPUs without VNNI: single layers, and whole networks.

    python benchmarks/pointwise.py                                        # layers of the widths of known networks
    python benchmarks/pointwise.py --networks ddpm-cifar10 dit-s-2        # evaluations of networks, random weights

Layers: pairs of them with their quantizers, and GELU between, as products of matrices and as convolutions, in turn in
one process. Networks: `ptq4dm` with the pair limit on few pairs, both graphs in turn; ratios are plain over pointwise
with quartiles, and both outputs are compared with the simulation.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import peers
import torch
from openvino import opset13 as ops

import octavo
from octavo.diffusion import find_denoiser, first_call
from octavo.evaluation.peers.architectures import architecture
from octavo.evaluation.speed import take_turns
from octavo.runtimes import integer_graph, kept_graphs
from octavo.runtimes.core import openvino_core
from octavo.runtimes.openvino import OpenVINOExecutor

SHAPES = (  # images, tokens, width, hidden width
    (8, 256, 256, 256),  # DDPM CIFAR-10's attention
    (1, 256, 384, 1536),  # DiT-S/2
    (8, 256, 384, 1536),
    (1, 4096, 320, 1280),  # Stable Diffusion 1.5, from its largest to its smallest feed-forward
    (1, 1024, 640, 2560),
    (1, 64, 1280, 5120),
    (1, 77, 768, 768),  # its text states
    (1, 37, 20, 36),  # widths that fill no register
)
PLAIN, POINTWISE = "product", "convolution"
DEPTH = 2


def layers(images: int, tokens: int, width: int, hidden: int, form: str) -> openvino.Model:
    """DEPTH times: normalize, quantize, widen, GELU, quantize, narrow, add."""
    random = np.random.default_rng(0)
    y = x = ops.parameter([images, tokens, width])
    for _ in range(DEPTH):
        z = ops.mvn(y, np.array([2]), True, 1e-5, "inside_sqrt")
        z = ops.gelu(_linear(z, hidden, width, form, random), "tanh")
        y = ops.add(y, _linear(z, width, hidden, form, random))
    return openvino.Model([y], [x])


def _linear(x: Any, out: int, inputs: int, form: str, random: np.random.Generator) -> Any:
    quantized = ops.fake_quantize(
        x, *[np.float32(end) for end in (-4, 4 - 8 / 256, -4, 4 - 8 / 256)], levels=256
    )
    ones = (1, 1) if form == POINTWISE else ()
    integers = random.integers(-63, 64, (out, inputs)).astype(np.int8).reshape(out, inputs, *ones)
    scales = np.full((out, 1, *ones), 1e-3, np.float32)
    weight = ops.multiply(ops.convert(ops.constant(integers), "f32"), ops.constant(scales))
    bias = random.standard_normal(out).astype(np.float32).reshape(out, *ones)
    if form == PLAIN:
        return ops.add(ops.matmul(quantized, weight, False, True), ops.constant(bias))
    image = ops.transpose(ops.unsqueeze(quantized, np.array([2])), np.array([0, 3, 1, 2]))
    y = ops.convolution(image, weight, [1, 1], [0, 0], [0, 0], [1, 1])
    return ops.squeeze(ops.transpose(ops.add(y, ops.constant(bias)), np.array([0, 2, 3, 1])), np.array([2]))


def of_layers(rounds: int) -> list[dict[str, Any]]:
    found, core = [], openvino_core()
    for shape in SHAPES:
        x = np.random.default_rng(1).standard_normal(shape[:3]).astype(np.float32)
        settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
        compiled = {
            form: core.compile_model(layers(*shape, form), "CPU", settings) for form in (PLAIN, POINTWISE)
        }
        outputs = {form: model([x])[0] for form, model in compiled.items()}
        timings = take_turns(
            {form: functools.partial(model, [x]) for form, model in compiled.items()}, rounds=rounds
        )
        row = {
            "images, tokens, width, hidden": shape,
            "ms": {form: 1000 * float(np.median(timing.seconds)) for form, timing in timings.items()},
            "ratio": timings[POINTWISE].ratio(timings[PLAIN]),
            "largest_difference": float(np.abs(outputs[PLAIN] - outputs[POINTWISE]).max()),
        }
        found.append(row)
        print(row)
    return found


def of_network(name: str, batch_sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    recipe = octavo.named_recipe("ptq4dm", samples=32, steps=4, pairs_per_trajectory=4, pair_limit=True)
    quantized = octavo.quantize(architecture(name), recipe, batch_size=4, progress=False)
    return [{"network": name, **of_batch(quantized, batch_size, rounds)} for batch_size in batch_sizes]


def of_batch(quantized: Any, batch_size: int, rounds: int) -> dict[str, Any]:
    denoiser = find_denoiser(quantized)[1]
    _, kwargs = first_call(quantized, batch_size=batch_size)
    executors: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for form in (PLAIN, POINTWISE):
            for module in (integer_graph, kept_graphs):
                module.convolutions_are_faster = lambda form=form: form == POINTWISE
            executors[form] = OpenVINOExecutor(denoiser, precision="f32", cache=Path(folder) / form)
            executors[form].prepare(**kwargs)
        simulated = denoiser(**kwargs)[0]
        outputs = {form: executor(**kwargs)[0] for form, executor in executors.items()}
        timings = take_turns(
            {form: functools.partial(executor, **kwargs) for form, executor in executors.items()},
            rounds=rounds,
        )
    row = {
        "batch_size": batch_size,
        "ms": {form: 1000 * float(np.median(timing.seconds)) for form, timing in timings.items()},
        "ratio": timings[POINTWISE].ratio(timings[PLAIN]),
        "relative_distance_to_simulation": {
            form: float((y - simulated).norm() / simulated.norm()) for form, y in outputs.items()
        },
    }
    print(row)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="*", default=[], help="names as `octavo bench` has them")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--name", default="pointwise", help="of the file in results/")
    options = parser.parse_args()
    figures: dict[str, Any] = {"rounds": options.rounds}
    if options.networks:
        figures["networks"] = [
            row for name in options.networks for row in of_network(name, options.batch_sizes, options.rounds)
        ]
    else:
        figures["layers"] = of_layers(options.rounds)
    peers.save(options.name, figures)


if __name__ == "__main__":
    main()

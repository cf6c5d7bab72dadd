"""Which products OpenVINO's int8 kernels add in 16 bits where there is no VNNI: those of neighbouring input channels.

    python benchmarks/pair_sums.py

Convolutions of one to three dimensions, with and without groups, and matmuls, of drawn shapes; weights whose
neighbouring input channels keep the limit of pairs (`octavo.quantization.pairs`) and mostly reach it, multiples of 4 in
number, or even and no multiples (`--other-inputs`, for which no limit is kept); inputs of 255 mostly. Counted by
kernel: layers whose sums are not the true ones, with such weights, and with free 8-bit ones.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import numpy as np
import openvino
import peers
import torch
import torch.nn.functional as F
from openvino import opset13 as ops

from octavo.quantization.pairs import PAIR_SUM, breaks_limit
from octavo.runtimes.core import openvino_core

INPUTS = (4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 48, 64, 96, 100, 128, 160, 192, 260, 300, 320)
OTHER_INPUTS = (2, 6, 10, 14, 30, 258, 350)
OUTPUTS = (1, 3, 4, 7, 8, 12, 16, 24, 32, 40, 64, 96, 128)
LARGEST = {1: 60, 2: 24, 3: 8}
Layer = tuple[int, int, tuple[int, ...], tuple[int, ...], dict[str, Any]]
CONVOLUTION = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def at_the_limit(draw: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    first = draw.integers(1, 128, (shape[0], shape[1] // 2, 1, *shape[2:]))
    first = np.where(draw.random(first.shape) < 0.4, 127, first)
    second = np.where(draw.random(first.shape) < 0.1, -127, PAIR_SUM - first)
    pairs = np.concatenate([first, second], axis=2) * draw.choice([-1, 1], first.shape)
    return np.where(draw.random(first.shape) < 0.5, pairs, pairs[:, :, ::-1]).reshape(shape).astype(np.int8)


def a_layer(
    draw: np.random.Generator, inputs_of: tuple[int, ...]
) -> tuple[int, int, tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    """Dimensions (0: a matmul), groups, the weight's and the input's shape, and the rest of a convolution."""
    dims = int(draw.choice([0, 1, 2, 2, 2, 3]))
    inputs, outputs, rows = int(draw.choice(inputs_of)), int(draw.choice(OUTPUTS)), int(draw.integers(1, 5))
    if dims == 0:
        return 0, 1, (outputs, inputs), (rows, int(draw.integers(1, 70)), inputs), {}
    groups = 1 if draw.random() < 0.85 or inputs > 40 else int(draw.choice([2, 3, 4]))
    kernel = [int(draw.choice([1, 2, 3, 3, 5]))] * dims
    if draw.random() < 0.2:
        kernel = [int(draw.choice([1, 2, 3, 4])) for _ in kernel]
    dilation = int(draw.choice([1, 1, 1, 2]))
    least = [(size - 1) * dilation + 1 for size in kernel]
    sides = [int(draw.integers(side, max(side + 1, LARGEST[dims]))) for side in least]
    more = {
        "stride": [int(draw.choice([1, 1, 2]))] * dims,
        "before": [int(draw.integers(0, 2)) for _ in kernel],
        "after": [int(draw.integers(0, 2)) for _ in kernel],
        "dilation": [dilation] * dims,
    }
    return dims, groups, (groups * outputs, inputs, *kernel), (rows, groups * inputs, *sides), more


def sums(dims: int, groups: int, weight: np.ndarray, x: np.ndarray, more: dict[str, Any]) -> tuple[bool, str]:
    """Whether the engine's are the true ones, and which kernel made them."""
    parameter = ops.parameter(list(x.shape))
    ends = [np.float32(end) for end in (0, 255, 0, 255)]
    quantized = ops.fake_quantize(parameter, *ends, levels=256)
    constant = weight if groups == 1 else weight.reshape(groups, -1, *weight.shape[1:])
    ones = np.ones((*constant.shape[: 1 + (groups > 1)], *[1] * (weight.ndim - 1)), np.float32)
    scaled = ops.multiply(ops.convert(ops.constant(constant), "f32"), ops.constant(ones))
    if dims == 0:
        y = ops.matmul(quantized, scaled, False, True)
        true = torch.from_numpy(x).double() @ torch.from_numpy(weight).double().T
    else:
        make = ops.convolution if groups == 1 else ops.group_convolution
        y = make(quantized, scaled, more["stride"], more["before"], more["after"], more["dilation"])
        sides = [n for pair in zip(more["before"][::-1], more["after"][::-1], strict=True) for n in pair]
        true = CONVOLUTION[dims](
            F.pad(torch.from_numpy(x).double(), sides),
            torch.from_numpy(weight).double(),
            stride=more["stride"],
            dilation=more["dilation"],
            groups=groups,
        )
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino_core().compile_model(openvino.Model([y], [parameter]), "CPU", settings)
    about = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    kinds = ("Convolution", "FullyConnected", "MatMul")
    kernel = next(
        info["primitiveType"].astype(str) for info in about if info["layerType"].astype(str) in kinds
    )
    return bool(np.array_equal(np.array(compiled(x)[0], np.float64), true.numpy())), kernel


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--other-inputs", action="store_true", help="even, but no multiples of 4")
    options = parser.parse_args()
    draw = np.random.default_rng(options.seed)
    looked_at, wrong, wrong_if_free = Counter(), Counter(), Counter()
    for _ in range(options.draws):
        dims, groups, shape, of_input, more = a_layer(draw, OTHER_INPUTS if options.other_inputs else INPUTS)
        x = np.where(draw.random(of_input) < 0.85, 255, draw.integers(0, 256, of_input)).astype(np.float32)
        weight = at_the_limit(draw, shape)
        assert not breaks_limit(torch.from_numpy(weight))
        exact, kernel = sums(dims, groups, weight, x, more)
        looked_at[kernel] += 1
        wrong[kernel] += not exact
        free = np.where(draw.random(shape) < 0.5, 127, draw.integers(-127, 128, shape)).astype(np.int8)
        exact, kernel = sums(dims, groups, free, x, more)
        wrong_if_free[kernel] += not exact
    rows = [
        {"kernel": kernel, "layers": count, "wrong": wrong[kernel], "wrong_if_free": wrong_if_free[kernel]}
        for kernel, count in looked_at.most_common()
    ]
    for row in rows:
        print(row)
    peers.save("pair_sums_other" if options.other_inputs else "pair_sums", {**vars(options), "rows": rows})


if __name__ == "__main__":
    main()

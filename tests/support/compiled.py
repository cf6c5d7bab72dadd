"""Triton's kernels compiled for GPUs that are not there, as real layers launch them; what came of it, as JSON.

python tests/support/compiled.py 80 90      # compute capabilities 8.0 and 9.0; without TRITON_INTERPRET
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import torch
from integers import U8, integer_layer
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from octavo.quantization.timestep_groups import CurrentGroup
from octavo.runtimes.cuda import launch
from octavo.runtimes.cuda.layers import IntegerLayer
from octavo.runtimes.cuda.tiles import Tile

POINTERS = {
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
}
CASES = (
    (nn.Linear(64, 128), (1, 64), torch.float32, False),  # one row: arguments of 1 become constants
    (nn.Linear(64, 128), (2, 300, 64), torch.bfloat16, True),
    (nn.Conv2d(128, 128, 3, padding=1), (2, 128, 16, 16), torch.bfloat16, True),
    (nn.Conv2d(128, 128, 3, padding=1), (8, 128, 64, 64), torch.bfloat16, False),
    (nn.Conv2d(4, 6, 3, stride=2, groups=2), (1, 4, 9, 9), torch.float32, False),
)
"""A layer, the shape and dtype of what it reads, and whether it is balanced and has scales by timestep."""


def source(kernel: Any, arguments: tuple[Any, ...]) -> Any:
    """The kernel specialised as a launch with these arguments would specialise it."""
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=True)):
        name = parameter.name
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            is_tensor = isinstance(value, torch.Tensor)
            signature[name] = POINTERS[value.dtype] if is_tensor else "i32"
            if is_tensor or value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def main(capabilities: list[int]) -> list[dict[str, Any]]:
    """Compile what the cases launch, for each capability."""
    found = []

    def compiled(kernel: Any, grid: tuple[int, ...], tile: Tile, *arguments: Any) -> None:
        for capability in capabilities:
            target = GPUTarget("cuda", capability, 32)
            assembly = compile_kernel(source(kernel, arguments), target, tile.options).asm["ptx"]
            found.append(
                {
                    "kernel": kernel.fn.__name__,
                    "capability": capability,
                    "products": sorted(set(re.findall(r"\bw?g?mma\S*\.s32\S*", assembly))),
                    "contracted": len(re.findall(r"\bfma\.", assembly)),
                    "rounding": "4B400000" in assembly.upper() and "CB400000" in assembly.upper(),
                    "to_bfloat16": sorted(set(re.findall(r"\bcvt\S*bf16\S*\.f32", assembly))),
                    "tile": [tile.m, tile.n] if tile.k else [],
                    "writes": str(arguments[2 if "8_" in kernel.fn.__name__ else 1].dtype),
                }
            )

    launch._launch = compiled
    launch.processors = lambda device: 132
    for layer, shape, dtype, by_timestep in CASES:
        quantized = integer_layer(layer, U8, balanced=by_timestep)
        if by_timestep:
            quantized.timestep_factor, quantized.current_group = torch.tensor([1.0, 3.0]), CurrentGroup()
            quantized.current_group.index = torch.tensor([0, 1])
        IntegerLayer(quantized, "layer")(torch.zeros(shape, dtype=dtype))
    return found


if __name__ == "__main__":
    print(json.dumps(main([int(argument) for argument in sys.argv[1:]])))

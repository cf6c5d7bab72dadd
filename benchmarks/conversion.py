"""The first conversion of a network for OpenVINO by Octavo's own steps, beside `openvino.convert_model`'s, in turn.

    python benchmarks/conversion.py

DDPM CIFAR-10 architecture with random weights, quantized; all of `to_integer_graph` but for what makes a graph of the
trace. The graphs must have as many operations, and the same bits of output. Seconds: median with quartiles; the ratio
is of the same round.
"""

from __future__ import annotations

import argparse

import numpy as np
import peers
import torch

import octavo
from octavo.diffusion import first_call
from octavo.evaluation.peers.architectures import architecture
from octavo.evaluation.speed import format_table, table, take_turns
from octavo.runtimes import convert
from octavo.runtimes.calls import take_apart
from octavo.runtimes.core import openvino_core
from octavo.runtimes.integer_graph import to_integer_graph

OURS, THEIRS = "by its own steps", "openvino.convert_model"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    import openvino

    quantized = octavo.quantize(
        architecture("ddpm-cifar10"), octavo.PTQ4DM(samples=2, steps=2), progress=False
    )
    args, kwargs = first_call(quantized, batch_size=2)
    call = take_apart(quantized.unet.forward, args, kwargs)
    own = convert.from_trace

    def converted(by: object) -> openvino.Model:
        convert.from_trace = by  # type: ignore[assignment]
        try:
            return to_integer_graph(quantized.unet, call)
        finally:
            convert.from_trace = own

    outputs = []
    for by in (own, openvino.convert_model):
        model = converted(by)
        compiled = openvino_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(call.tensors[0].shape, generator=generator).numpy()
        outputs.append((len(model.get_ops()), compiled([x, *(t.numpy() for t in call.tensors[1:])])[0]))
    (operations, ours), (theirs_operations, theirs) = outputs
    same = operations == theirs_operations and bool(np.array_equal(ours, theirs))
    engines = {OURS: lambda: converted(own), THEIRS: lambda: converted(openvino.convert_model)}
    found = table(take_turns(engines, rounds=options.rounds, warm_up=1), THEIRS)
    print(
        f"{operations} operations; the same graph and bits: {same}\n{format_table(found, 'conversion', THEIRS)}"
    )
    peers.save("conversion", {**vars(options), "operations": operations, "same": same, "times": found})


if __name__ == "__main__":
    main()

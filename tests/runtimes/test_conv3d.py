"""A convolution over time and space: the integer kernels that engines take compute what the simulation does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from octavo.quantization import QuantSpec, quantize_layer
from octavo.quantization.affine import qparams_from_range
from octavo.quantization.rounding import round_nearest
from octavo.runtimes.onnx_executor import ONNXExecutor
from octavo.runtimes.openvino import OpenVINOExecutor


class OneLayer(nn.Module):
    """A network without `return_dict`, as decoders are: it returns its tensor."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(sample)
        return result


@pytest.mark.parametrize("runtime", ["openvino", "onnx"])
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"kernel_size": (3, 1, 1), "padding": (1, 0, 0)}, (2, 32, 5, 4, 4)),
        ({"kernel_size": 3, "padding": 1}, (2, 32, 4, 6, 6)),
    ],
)
def test_it_runs_in_int8_as_the_simulation_does(
    options: dict[str, Any], shape: tuple[int, ...], runtime: str, tmp_path: Path
) -> None:
    if runtime == "onnx":
        pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    torch.manual_seed(0)
    x, conv = torch.randn(shape), nn.Conv3d(32, 32, **options)
    weights, activations = QuantSpec(7, True, "per_channel", narrow=True), QuantSpec(8, symmetric=False)
    integers, qparams = round_nearest(conv.weight, weights)
    given = qparams_from_range(activations, float(x.min()), float(x.max()))
    network = OneLayer(quantize_layer(conv, weights, activations, integers, qparams, given)).eval()
    executor: OpenVINOExecutor | ONNXExecutor
    if runtime == "onnx":
        executor = ONNXExecutor(network, cache=tmp_path)
    else:
        executor = OpenVINOExecutor(network, precision="f32", timesteps=0, cache=tmp_path)
    executed = executor(sample=x)
    with torch.no_grad():
        exact, simulated = conv(x), network(x)
    assert [row.ok for graph in executor.graphs.values() for row in graph.audit] == [True]
    assert isinstance(executed, torch.Tensor)
    error = (simulated - exact).norm()
    assert 0 < error < 0.05 * exact.norm()
    assert (executed - simulated).norm() < 0.01 * error

"""What torch and ONNX Runtime get wrong between them: squeezed axes, zero points that weights share."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from octavo.quantization import QuantSpec, qparams_from_range, round_nearest
from octavo.quantization.layers import QUANTIZED_CLASS
from octavo.quantization.swap import replace, walk
from octavo.runtimes import onnx_session
from octavo.runtimes.audit import audited
from octavo.runtimes.calls import take_apart
from octavo.runtimes.onnx_convert import save_onnx, to_onnx
from octavo.runtimes.onnx_session import check_graph, session

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")


def written(network: nn.Module, x: torch.Tensor, path: Path, dialect: Any = "portable") -> Any:
    model = to_onnx(network, take_apart(network.forward, (x,), {}), dialect)
    save_onnx(model, path)
    check_graph(path)
    return model


class Squeezing(nn.Module):
    """Each overload, of axes of size 1 and of others; the first is the number of images."""

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        tokens = sample.flatten(2).squeeze(1)  # as PixArt squeezes its tokens: no axis of size 1
        one = tokens.mean(2, keepdim=True)
        parts = one.squeeze(), one.squeeze(-1), one.squeeze((0, 1, 2)), one.squeeze(2).squeeze(0)
        return (torch.stack(parts, 1) + tokens.squeeze((1, 2))[:, :4, :4],)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_only_axes_of_size_one_are_squeezed(rows: int, tmp_path: Path) -> None:
    """Torch squeezes one image's axis as well, but a graph for any number of images has it."""
    network, path = Squeezing().eval(), tmp_path / "graph.onnx"
    model = written(network, torch.zeros(2, 4, 2, 3), path)
    assert Counter(node.op_type for node in model.graph.node)["Squeeze"] <= 4
    loaded, _ = session(path, tmp_path, [])
    x = torch.randn(rows, 4, 2, 3, generator=torch.Generator().manual_seed(0))
    simulated = network(torch.cat([x, x]))[0][:rows]
    assert np.allclose(loaded.run(None, {"sample": x.numpy()})[0], simulated, atol=1e-6)


class Twins(nn.Module):
    """Layers with as many outputs as each other, whose zero points are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(4, 16, 3), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        return (self.second(self.first(self.conv(sample).flatten(2).mT).sigmoid()),)


@pytest.mark.parametrize("dialect", ["portable", "onnxruntime"])
def test_each_weight_has_zero_points_of_its_own(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else ONNX Runtime's exact kernels on CPUs without VNNI do not load the graph; on others this is by its names."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, x = Twins().eval(), torch.randn(2, 4, 6, 6)
    weights, spec = QuantSpec(8, granularity="per_channel", narrow=True), QuantSpec()
    for name, layer in list(walk(network)):
        rounded, of_input = round_nearest(layer.weight, weights, "minmax"), qparams_from_range(spec, -2, 2)
        kind = QUANTIZED_CLASS[type(layer)]
        replace(network, name, kind.from_float(layer, weights, spec, *rounded, of_input))
    model = written(network, x, tmp_path / "graph.onnx", dialect)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    read = [node.input for node in model.graph.node if constants.get(node.input[0], x).dtype == np.int8]
    assert len(read) == len({zero_points for _, _, zero_points in read}) == 3
    assert all(constants[zero_points].dtype == np.int8 for _, _, zero_points in read)
    monkeypatch.setattr(onnx_session, "adds_in_16_bits", lambda: True)
    loaded, rows = session(tmp_path / "graph.onnx", tmp_path, audited(network), threads=1)
    if dialect == "onnxruntime":
        assert len(rows) == 3 and all(row.ok for row in rows)
    with torch.no_grad():
        simulated = network(x)[0].numpy()
    output = loaded.run(None, {"sample": x.numpy()})[0]
    assert np.linalg.norm(output - simulated) < 0.01 * np.linalg.norm(simulated)

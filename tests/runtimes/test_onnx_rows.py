"""Networks that ONNX Runtime has no graph for any number of rows of, and what no graph can be made of or loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from octavo.errors import OctavoError
from octavo.runtimes import network as networks
from octavo.runtimes import onnx_executor
from octavo.runtimes.calls import take_apart
from octavo.runtimes.convert import FixedRows
from octavo.runtimes.onnx_convert import to_onnx
from octavo.runtimes.onnx_executor import FIXED_ROWS, ONNXExecutor
from octavo.runtimes.onnx_session import check_graph, session

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of this file's networks are cached, as those of known packages are."""
    monkeypatch.setattr(networks, "KNOWN", {*networks.KNOWN, __name__.partition(".")[0]})


class Counted(nn.Module):
    """Makes constants of the number of rows, as ChromaTransformer2DModel does."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        ones = torch.tensor([[1.0]] * len(sample))
        return torch.cat([sample * timestep[:, None], ones], 1)


def test_a_network_of_one_number_of_rows_has_a_graph_for_each(tmp_path: Path) -> None:
    network, timestep = Counted().eval(), torch.tensor(7)
    call = take_apart(network.forward, (torch.ones(3, 2), timestep), {})
    with pytest.raises(FixedRows, match=r"^sample: Counted is exported for 2 rows alone; give a batch size$"):
        to_onnx(network, call)
    for _ in range(2):  # converted, and from the cache
        executor = ONNXExecutor(network, threads=1, cache=tmp_path)
        for rows in (3, 1, 2, 3):
            x = torch.randn(rows, 2)
            assert torch.equal(executor(x, timestep), network(x, timestep.expand(rows)))
        assert len(executor.graphs) == 3
    found = sorted(path.parent.name.partition("-of-")[2] for path in tmp_path.glob("*/*/graph.onnx"))
    assert found == ["1", "2", "3"] and len(list(tmp_path.glob(f"*/*/{FIXED_ROWS}"))) == 1


def test_its_parts_are_of_its_number_of_rows(tmp_path: Path) -> None:
    network, timestep = Counted().eval(), torch.tensor(7)
    executor = ONNXExecutor(network, threads=2, cache=tmp_path)
    executor._layers = ["of a quantized network"]
    with pytest.raises(OctavoError, match="of a quantized network"):  # which the graph has not
        executor(torch.ones(4, 2), timestep)
    executor.on_fallback, x = "warn", torch.randn(4, 2)
    assert torch.equal(executor(x, timestep), network(x, timestep.expand(4)))
    assert [graph.parts for graph in executor.graphs.values()] == [2]
    assert [path.parent.name[-5:] for path in tmp_path.glob("*/*/graph.onnx")] == ["-of-2"]


class Inverting(nn.Module):
    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return torch.linalg.inv(sample)


def test_what_torch_cannot_export_is_told_by_its_first_cause_in_a_line() -> None:
    network = Inverting().eval()
    with pytest.raises(
        OctavoError, match=r"^Inverting: torch cannot export it to ONNX \(.*linalg_inv"
    ) as caught:
        to_onnx(network, take_apart(network.forward, (torch.ones(2, 3, 3),), {}))
    message = str(caught.value)
    assert "\n" not in message and "\x1b" not in message and message.endswith("by OpenVINO or in torch")


def wrong_graph() -> onnx.ModelProto:
    """Squeezes an axis of three."""
    text = (
        '<ir_version: 9, opset_import: ["" : 20]> g (float[N,3] sample) => (float[N] y) <int64[1] one = {1}>'
    )
    return onnx.parser.parse_model(f"{text} {{ y = Squeeze(sample, one) }}")


def test_what_onnx_refuses_is_told_in_a_line(tmp_path: Path) -> None:
    onnx.save(wrong_graph(), tmp_path / "denoiser.onnx")
    with pytest.raises(
        OctavoError, match=r"^denoiser.onnx: onnx's checker refuses it \(.*Squeeze.*report it$"
    ):
        check_graph(tmp_path / "denoiser.onnx")
    with pytest.raises(OctavoError, match=r"^denoiser.onnx: ONNX Runtime cannot load it \(.*report it$"):
        session(tmp_path / "denoiser.onnx", tmp_path, [])


def test_what_onnx_runtime_does_not_load_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnx_executor, "to_onnx", lambda *_: wrong_graph())
    executor = ONNXExecutor(Inverting().eval(), threads=1, cache=tmp_path)
    with pytest.raises(OctavoError, match="ONNX Runtime cannot load it"):
        executor(torch.ones(2, 3, 3))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not capfd.readouterr().err

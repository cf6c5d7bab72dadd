from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from octavo.errors import OctavoError
from octavo.runtimes import network as networks
from octavo.runtimes.calls import take_apart
from octavo.runtimes.convert import FixedRows, to_openvino
from octavo.runtimes.kept_graphs import FIXED_ROWS
from octavo.runtimes.openvino import OpenVINOExecutor


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of this file's networks are cached, as those of known packages are."""
    monkeypatch.setattr(networks, "KNOWN", {*networks.KNOWN, __name__.partition(".")[0]})


class Counted(nn.Module):
    """Makes constants of the number of rows, as ChromaTransformer2DModel does."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        ones = torch.tensor([[1.0]] * len(sample))
        return torch.cat([sample * timestep[:, None], ones], 1)


class Combined(nn.Module):
    """Does what the engine has no operation for."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return torch.combinations(sample[0])


def test_a_network_of_one_number_of_rows_has_a_graph_for_each(tmp_path: Path) -> None:
    network, timestep = Counted().eval(), torch.tensor(7)
    call = take_apart(network.forward, (torch.ones(3, 2), timestep), {})
    with pytest.raises(FixedRows, match=r"^Counted: its graph is for 2 rows alone; give a batch size$"):
        to_openvino(network, call)
    for _ in range(2):  # converted, and from the cache
        executor = OpenVINOExecutor(network, precision="f32", cache=tmp_path)
        for rows in (3, 1, 2, 3):
            x = torch.randn(rows, 2)
            assert torch.equal(executor(x, timestep), network(x, timestep.expand(rows)))
        assert len(executor.graphs) == 3
    found = sorted(
        folder.name.partition("-")[2] for folder in tmp_path.glob("*/*") if (folder / "graph.xml").is_file()
    )
    assert found == ["1", "2", "3"] and len(list(tmp_path.glob(f"*/*/{FIXED_ROWS}"))) == 1


def test_what_the_engine_knows_no_operation_for_is_told_in_a_line() -> None:
    network = Combined().eval()
    with pytest.raises(
        OctavoError, match=r"^Combined: OpenVINO cannot convert .*aten::combinations.*; sample it in torch"
    ):
        to_openvino(network, take_apart(network.forward, (torch.ones(2, 3),), {}))


class Thirds(nn.Module):
    """Wants three rows for each image."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        a, b, c = sample.chunk(3)
        return a + b + c


class Choosy(nn.Module):
    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        raise OctavoError("sample: is of no size")


def test_what_cannot_be_traced_is_told_in_a_line() -> None:
    for network, told in (
        (
            Thirds(),
            r"^Thirds: OpenVINO cannot trace it \(not enough values to unpack .*\); sample it in torch",
        ),
        (Choosy(), "^sample: is of no size$"),
    ):
        with pytest.raises(OctavoError, match=told):
            to_openvino(network, take_apart(network.forward, (torch.ones(3, 3),), {}))

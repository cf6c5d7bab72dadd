"""Complex constants of a network that is exported to ONNX: rotary frequencies put together from parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from octavo.runtimes.calls import take_apart
from octavo.runtimes.onnx_convert import save_onnx, to_onnx
from octavo.runtimes.onnx_session import check_graph, session

pytest.importorskip("onnx", reason="the extra onnx is not installed")


class Rotating(nn.Module):
    """As QwenImage: frequencies are no buffer, because casting would lose their imaginary part."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(8.0), torch.tensor([1.0, 0.5, 0.1]))
        self.frequencies = torch.polar(torch.ones_like(angles), angles)
        self.parameter = nn.Parameter(torch.tensor(0.5))

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        rows, columns = self.frequencies.split([1, 2], dim=1)
        places = torch.cat([rows[:4].expand(4, 1), columns[-4:]], dim=1)
        pairs = torch.view_as_complex(sample.unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs * places.unsqueeze(0)).flatten(2)
        return (turned * self.parameter + places.real.sum(),)


def test_they_are_computed_beforehand(tmp_path: Path) -> None:
    network, path = Rotating().eval(), tmp_path / "graph.onnx"
    frequencies = network.frequencies.clone()
    save_onnx(to_onnx(network, take_apart(network.forward, (torch.zeros(2, 4, 6),), {})), path)
    check_graph(path)
    loaded, _ = session(path, tmp_path, [])
    for rows in (1, 3):
        x = torch.randn(rows, 4, 6, generator=torch.Generator().manual_seed(rows))
        with torch.no_grad():
            exact = network(x)[0].numpy()
        assert np.allclose(loaded.run(None, {"sample": x.numpy()})[0], exact, atol=1e-5)
    assert torch.equal(network.frequencies, frequencies)

from __future__ import annotations

from typing import Any

import pytest
import torch

from octavo.quantization import QuantSpec, fake_quantize
from octavo.quantization.ranges import search_values
from octavo.threads import torch_threads


def test_the_threads_come_back_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


def test_a_range_search_takes_one_thread_whatever_torch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def recorded(*arguments: Any) -> torch.Tensor:
        seen.add(torch.get_num_threads())
        return fake_quantize(*arguments)

    monkeypatch.setattr("octavo.quantization.ranges.fake_quantize", recorded)
    x = torch.randn(8, 500, generator=torch.Generator().manual_seed(0))
    with torch_threads(3):
        search_values(x, QuantSpec(granularity="per_channel"))
        assert torch.get_num_threads() == 3
    assert seen == {1}

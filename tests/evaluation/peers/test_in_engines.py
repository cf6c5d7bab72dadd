from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from octavo.diffusion import first_call
from octavo.evaluation.peers.in_engines import faster, nncf_int8
from octavo.evaluation.peers.task import Task


def test_what_nncf_prints_is_not_on_standard_output(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def quantize(model: Any, dataset: list[Any], *, subset_size: int, **_: Any) -> Any:
        print(f"Statistics collection {subset_size}")
        assert len(dataset) == subset_size == 1
        return model

    stand_in = SimpleNamespace(quantize=quantize, Dataset=list, QuantizationPreset=str)
    monkeypatch.setitem(sys.modules, "nncf", stand_in)
    _, kwargs = first_call(pipeline, batch_size=2)
    engine = nncf_int8(Task(pipeline.unet, kwargs, [kwargs]), "f32", "mixed")
    with torch.inference_mode():
        ours, theirs = engine(), pipeline.unet(**kwargs, return_dict=False)[0]
    ours = ours[0] if isinstance(ours, (tuple, list)) else ours
    assert torch.allclose(torch.as_tensor(ours), theirs, atol=1e-4)
    out, err = capsys.readouterr()
    assert (out, err.strip()) == ("", "Statistics collection 1")


def test_the_faster_of_two_cuts_is_taken() -> None:
    def slow() -> None:
        time.sleep(0.05)

    def fast() -> None:
        pass

    assert faster([slow, fast]) is fast and faster([fast, slow]) is fast and faster([slow]) is slow

"""One accelerated network called by several threads, and its deep copies: each gets its own results."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import tiny_pipeline

import octavo
from octavo.runtimes import executor_of
from octavo.runtimes.onnx_executor import ONNXExecutor
from octavo.runtimes.openvino import OpenVINOExecutor

CALLS = 60


def in_threads(*works: Callable[[], Any]) -> list[Any]:
    """What each returned, all started together."""
    results: list[Any] = [None] * len(works)
    together = threading.Barrier(len(works))

    def run(k: int) -> None:
        together.wait()
        results[k] = works[k]()

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def noise(seed: int, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def wrong(unet: Any, seed: int, expected: torch.Tensor) -> int:
    """Of so many calls on the seed's image, those that do not give what is expected."""
    with torch.no_grad():
        return sum(not torch.equal(unet(noise(seed), 500).sample, expected) for _ in range(CALLS))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("deep", [False, True])
def test_each_thread_gets_the_results_of_its_own_inputs(quantized: Any, deep: bool, threads: int) -> None:
    """As one network, and as deep copies of the pipeline; with one request for a batch, and with two."""
    fast = octavo.accelerate(quantized, precision="f32", threads=threads, batch_size=2)
    unets = [(copy.deepcopy(fast) if deep else fast).unet for _ in range(2)]
    expected = [fast.unet(noise(seed), 500).sample for seed in range(2)]
    assert in_threads(*(lambda k=k: wrong(unets[k], k, expected[k]) for k in range(2))) == [0, 0]


def test_a_shape_that_two_threads_ask_for_is_compiled_once(
    quantized: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = octavo.accelerate(quantized, precision="f32", threads=1)
    compiled = []
    compile_one = OpenVINOExecutor._compile

    def count(self: OpenVINOExecutor, *args: Any) -> Any:
        compiled.append(args)
        return compile_one(self, *args)

    monkeypatch.setattr(OpenVINOExecutor, "_compile", count)
    a, b = in_threads(*[lambda: fast.unet(noise(0, rows=3), 500).sample] * 2)
    executor = executor_of(fast)
    assert torch.equal(a, b) and len(compiled) == 1 and executor is not None and len(executor.graphs) == 2


def test_onnx_sessions_are_made_once_and_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    executor = ONNXExecutor(tiny_pipeline(levels=1).unet, threads=1)
    made = []
    make_one = ONNXExecutor._made

    def count(self: ONNXExecutor, *args: Any) -> Any:
        made.append(args)
        return make_one(self, *args)

    monkeypatch.setattr(ONNXExecutor, "_made", count)
    first = in_threads(*(lambda k=k: executor(noise(k), 500).sample for k in range(2)))
    assert len(made) == 1
    assert in_threads(*(lambda k=k: wrong(executor, k, first[k]) for k in range(2))) == [0, 0]

"""A whole network on torch-cuda against its simulation; in Triton's interpreter unless TRITON_INTERPRET=0."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import pickle
import re
import threading
from importlib.metadata import version
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, UNet2DModel
from tiny import RECIPES, tiny_pipeline
from torch._dynamo.utils import counters

import octavo
from octavo.diffusion import generators
from octavo.errors import OctavoError
from octavo.evaluation.shards import executed
from octavo.quantization import quantized_layers
from octavo.runtimes import executor_of
from octavo.runtimes.calls import take_apart
from octavo.runtimes.cuda import executor as executors
from octavo.runtimes.cuda.captured import Captured
from octavo.runtimes.cuda.executor import TorchCudaExecutor

pytest.importorskip("triton", reason="triton is not installed (pip install octavo[cuda])")


def noise(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def executor(pipeline: DDIMPipeline) -> TorchCudaExecutor:
    found = executor_of(pipeline)
    assert isinstance(found, TorchCudaExecutor)
    return found


@pytest.fixture(scope="module")
def small() -> DDIMPipeline:
    """23 layers, some of them with scales for two groups of timesteps, some balanced."""
    recipe = octavo.PTQ4DM(
        samples=16, steps=4, pairs_per_trajectory=4, timesteps="uniform", timestep_groups=2, balance=True
    )
    return octavo.quantize(tiny_pipeline(levels=1), recipe, batch_size=8, progress=False)


@pytest.fixture(scope="module")
def fast(small: DDIMPipeline) -> DDIMPipeline:
    return octavo.accelerate(small, runtime="torch-cuda", precision="f32", batch_size=2)


def test_parity_with_the_simulation(fast: DDIMPipeline, small: DDIMPipeline) -> None:
    """To float32 precision where no value sits on a rounding border; rows have their own timesteps and groups."""
    differences = []
    with torch.no_grad():
        for seed, timesteps in enumerate(torch.tensor([[1, 900], [500, 20], [999, 300]])):
            x = noise(2, seed)
            expected, executed = small.unet(x, timesteps).sample, fast.unet(x, timesteps).sample
            differences += [relative(*rows) for rows in zip(executed, expected, strict=True)]
        assert relative(small.unet(x, timesteps.flip(0)).sample, expected) > 1e-2
    assert min(differences) < 2e-6 and max(differences) < 0.05


def test_threads_share_one_and_a_call_is_watched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = TorchCudaExecutor(tiny_pipeline(levels=1).unet, precision="f32")
    watched: list[Any] = []
    found: list[Any] = [None, None]
    together = threading.Barrier(2)
    watch = TorchCudaExecutor._watched

    def count(self: TorchCudaExecutor, call: Any) -> Any:
        watched.append(call)
        return watch(self, call)

    def run(k: int) -> None:
        together.wait()
        found[k] = shared(noise(2, k), 500).sample

    monkeypatch.setattr(TorchCudaExecutor, "_watched", count)
    threads = [threading.Thread(target=run, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(watched) == 1
    for k in range(2):
        assert torch.equal(found[k], shared(noise(2, k), 500).sample)


def test_the_audit_lists_what_was_launched(fast: DDIMPipeline, small: DDIMPipeline) -> None:
    rows = octavo.audit(fast)
    assert [row.layer for row in rows] == [name for name, _ in quantized_layers(small.unet)]
    kernels = {
        name: "int8_convolution"
        if layer.weight_int8.ndim == 4 and layer.weight_int8.shape[-1] > 1
        else "int8_matmul"
        for name, layer in quantized_layers(small.unet)
    }
    assert set(kernels.values()) == {"int8_convolution", "int8_matmul"}
    for row in rows:
        assert (
            row.precision == "i8"
            and row.kernel.removesuffix(" (interpreter)") == f"triton {kernels[row.layer]}"
        )
    assert [graph.precision for graph in executor(fast).graphs.values()] == ["f32"]


def test_what_was_not_launched_is_not_listed_as_run(
    small: DDIMPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    from octavo.runtimes.cuda.layers import IntegerLayer

    def forgets(self: IntegerLayer, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], len(self.weight)) if self.geometry is None else run(self, x)

    run = IntegerLayer.forward
    monkeypatch.setattr(IntegerLayer, "forward", forgets)
    with pytest.raises(
        OctavoError, match=r"11 of 23 layers with integer activations fell back to float: .* \(missing\)"
    ):
        octavo.accelerate(small, runtime="torch-cuda", precision="f32")


@pytest.mark.filterwarnings(
    "ignore:invalid value encountered in cast:RuntimeWarning"
)  # Triton's interpreter, of NaN
def test_it_stays_a_drop_in(fast: DDIMPipeline, small: DDIMPipeline) -> None:
    assert type(fast) is DDIMPipeline and isinstance(fast.unet, UNet2DModel)
    assert executor_of(small) is None and copy.deepcopy(executor(fast)) is executor(fast)
    output = fast.unet(noise(2), 3, return_dict=False)
    assert isinstance(output, tuple) and output[0].device == torch.device("cpu")
    images = fast(batch_size=2, num_inference_steps=1, generator=generators(0, 0, 2), output_type="np").images
    assert images.shape == (2, 8, 8, 3)
    with pytest.raises(OctavoError, match="pickle: an accelerated pipeline"):
        pickle.dumps(executor(fast))
    with pytest.raises(OctavoError, match="holds NaN, infinity"):
        fast.unet(noise(2) * torch.nan, 3)


def test_bf16_leaves_the_edges_in_f32(small: DDIMPipeline, fast: DDIMPipeline) -> None:
    """conv_in reads the image itself and conv_out's numbers are not rounded again; what lies between is in bf16."""
    other = octavo.accelerate(small, runtime="torch-cuda", precision="bf16", batch_size=2)
    assert all(row.ok for row in octavo.audit(other))
    network = executor(other)._network
    assert network.conv_in.answer == torch.bfloat16 and network.conv_out.answer == torch.float32
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16} and network.dtype == torch.bfloat16
    x, t = noise(2), torch.tensor([500.0, 500.0])
    exact, half = fast.unet(x, t).sample, other.unet(x, t).sample
    assert half.dtype == torch.float32 and not torch.equal(half, half.bfloat16().float())
    assert 1e-4 < relative(half, exact) < 0.1
    seen: list[Any] = []

    def settings() -> list[str]:
        cudnn: Any = torch.backends.cudnn
        return [cudnn.conv.fp32_precision, torch.get_float32_matmul_precision()]

    torch.set_float32_matmul_precision("high")
    try:
        before = settings()
        with network.conv_in.register_forward_pre_hook(lambda _, args: seen.extend([args[0], settings()])):
            call = take_apart(executor(other)._forward, (x, t), {})
            executor(other)._evaluation(network, call)(call.tensors)
        assert torch.equal(seen[0].cpu(), x) and seen[1] == ["ieee", "highest"] and before == settings()
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("f32, bf16, chosen", [(10.0, 9.0, "bf16"), (10.0, 9.9, "f32")])
def test_auto_takes_bf16_where_it_is_faster(
    small: DDIMPipeline, f32: float, bf16: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what is measured, on a GPU; the interpreter is never measured."""
    runner = executor(octavo.accelerate(small, runtime="torch-cuda"))
    if runner.device.type == "cpu":
        assert [graph.precision for graph in runner.graphs.values()] == ["f32"]
    monkeypatch.setattr(executors, "measured", lambda evaluation_in: {"f32": f32, "bf16": bf16})
    assert runner._faster({}, None) == chosen  # type: ignore[arg-type]


def test_products_of_attention_have_no_kernel(caplog: pytest.LogCaptureFixture) -> None:
    """Refused, or run in torch's simulation and listed as that; so is the rounding of the output, in a hook."""
    quantized = octavo.quantize(tiny_pipeline(levels=1), RECIPES[0], batch_size=4, progress=False)
    with pytest.raises(
        OctavoError, match=r"2 of 25 layers with integer activations fell back to float: .*\.qk \(f32\)"
    ):
        octavo.accelerate(quantized, runtime="torch-cuda", precision="f32")
    with caplog.at_level(logging.WARNING):
        fast = octavo.accelerate(quantized, runtime="torch-cuda", precision="f32", on_fallback="warn")
    assert "fell back to float" in caplog.text
    products = [row for row in octavo.audit(fast) if row.layer.endswith((".qk", ".pv"))]
    assert {(row.kernel, row.precision) for row in products} == {("torch simulation", "f32")}
    with torch.no_grad():
        assert relative(fast.unet(noise(1), 9).sample, quantized.unet(noise(1), 9).sample) < 0.05


def test_changed_weights_are_not_executed(fast: DDIMPipeline) -> None:
    layer = next(layer for _, layer in quantized_layers(executor(fast).denoiser))
    layer.weight_int8.neg_()
    try:
        with pytest.raises(OctavoError, match="accelerate it again"):
            fast.unet(noise(1), 3)
    finally:
        layer.weight_int8.neg_()


def test_what_computes_is_part_of_what_images_are_named_by(fast: DDIMPipeline) -> None:
    runtime, networks = executed(fast)
    assert runtime[:2] == ["torch-cuda", ["f32"]] and runtime[-1] == version("triton")
    assert networks is not None and list(networks) == ["unet"]


def test_reuse_is_refused(small: DDIMPipeline) -> None:
    with pytest.raises(OctavoError, match="reuse: the runtime torch-cuda does not reuse features"):
        octavo.accelerate(small, runtime="torch-cuda", reuse=object())  # type: ignore[arg-type]


def test_what_is_compiled_launches_the_same_and_answers_alike(
    small: DDIMPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one graph, traced without the compiler behind it, so that not a bit may differ."""
    monkeypatch.setattr(executors, "COMPILER", "aot_eager")
    counters.clear()
    call = noise(2), torch.tensor([1, 900])
    compiled, plain = (
        TorchCudaExecutor(small.unet, precision="f32", compiled=compiled) for compiled in (True, False)
    )
    launches = compiled.prepare(*call)
    assert launches.audit == plain.prepare(*call).audit and all(row.ok for row in launches.audit)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    others = noise(2, 1), torch.tensor([500, 20])
    expected = plain(*others).sample
    assert torch.equal(compiled(*others).sample, expected)
    with torch.inference_mode():
        assert torch.equal(
            compiled(others[0].to(memory_format=torch.channels_last), others[1]).sample, expected
        )
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")  # torch, on Python 3.13.0 alone
@pytest.mark.parametrize(
    "backend, why",
    [
        ("raises", "no such processor"),
        ("answers otherwise", "its answer is 1 from the network's"),
        ("answers as at first", "its answer is [0-9.]* from the network's"),
        ("leaves out", "it leaves out conv_out"),
    ],
)
def test_what_cannot_be_compiled_runs_without(
    small: DDIMPipeline,
    backend: str,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def compiler(module: Any, inputs: Any) -> Any:
        if backend == "raises":
            raise RuntimeError("no such processor")
        if backend == "answers otherwise":
            return lambda *tensors: [y * 2 for y in module(*tensors)]
        if backend == "answers as at first":
            return lambda *tensors: module(*inputs)
        for node in module.graph.nodes:
            if node.args and node.args[-1] == "conv_out":
                node.args = (*node.args[:-1], "")
        module.recompile()
        return module

    quantized = small.unet if backend != "leaves out" else _with_its_last_layer_quantized()
    monkeypatch.setattr(executors, "COMPILER", compiler)
    shared = TorchCudaExecutor(quantized, precision="f32", compiled=True)
    with caplog.at_level(logging.WARNING):
        rows = shared.prepare(noise(1), 500).audit
    (record,) = [record for record in caplog.records if record.name.startswith("octavo")]
    assert re.search(f"the network runs without torch.compile: .*{why}", record.message)
    assert all(row.ok for row in rows)
    expected = TorchCudaExecutor(quantized, precision="f32", compiled=False)(noise(1, 1), 20).sample
    assert torch.equal(shared(noise(1, 1), 20).sample, expected)


def test_kinds_differ_by_dtype(fast: DDIMPipeline) -> None:
    """A mask of booleans and one that is added are of one shape; `float32`, which all floats become, is one kind."""
    call = take_apart(executor(fast)._forward, (noise(2), 3), {})
    other = dataclasses.replace(call, tensors=(call.tensors[0], call.tensors[1] > 0))
    halved = take_apart(executor(fast)._forward, (noise(2).half(), 3), {})
    keys = [executors._key(each) for each in (call, halved, other)]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.skipif(os.environ["TRITON_INTERPRET"] == "1", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_on_a_gpu_calls_are_compiled_and_replayed(
    small: DDIMPipeline, precision: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Other tensors, from the CPU and the GPU, on other streams; an answer is not written over by the next."""
    with caplog.at_level(logging.WARNING):
        quick = TorchCudaExecutor(small.unet, precision)
        with torch.inference_mode():  # as some call it first
            launches = quick.prepare(noise(2), torch.tensor([1, 900]))
    assert isinstance(launches.evaluate, Captured) and all(row.ok for row in launches.audit)
    assert not caplog.records
    first = quick(noise(2, 1), torch.tensor([500, 20])).sample
    kept = first.clone()
    with torch.cuda.stream(torch.cuda.Stream()):
        again = quick(noise(2, 1).cuda(), torch.tensor([500, 20])).sample
        quick(noise(2, 2).cuda(), torch.tensor([9, 8]))
    assert torch.equal(first, kept) and torch.equal(again.cpu(), first)
    quick(noise(3), 7)  # another kind's graph shares its memory
    assert torch.equal(quick(noise(2, 1), torch.tensor([500, 20])).sample, first)
    plain = TorchCudaExecutor(small.unet, precision, compiled=False)
    expected = plain(noise(2, 1), torch.tensor([500, 20])).sample
    assert relative(first, expected) < 0.05
    for other in (quick, plain):
        with pytest.raises(OctavoError, match="holds NaN, infinity"):
            other(noise(2) * torch.nan, torch.tensor([500, 20]))


@pytest.mark.skipif(os.environ["TRITON_INTERPRET"] == "1", reason="CUDA graphs need a GPU")
def test_on_a_gpu_what_reads_a_number_back_is_not_captured(
    small: DDIMPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    runner = TorchCudaExecutor(small.unet, precision="f32", compiled=False)
    runner.prepare(noise(1), 500)
    runner._network.conv_out.register_forward_pre_hook(lambda _, args: args[0].sum().item() and None)
    with caplog.at_level(logging.WARNING):
        launches = runner.prepare(noise(2), 500)
    assert "runs without a CUDA graph" in caplog.text and not isinstance(launches.evaluate, Captured)
    assert torch.randn(1, device="cuda").isfinite() and runner(noise(2), 20).sample.isfinite().all()


def _with_its_last_layer_quantized() -> Any:
    recipe = octavo.PTQ4DM(samples=4, steps=4, first_and_last="quantized")
    return octavo.quantize(tiny_pipeline(levels=1), recipe, batch_size=4, progress=False).unet

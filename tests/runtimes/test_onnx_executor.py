from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, UNet2DModel

import octavo
from octavo.diffusion import generators
from octavo.errors import OctavoError
from octavo.evaluation.shards import executed
from octavo.quantization import quantized_layers, quantized_products
from octavo.quantization.attention_calls import product_name
from octavo.runtimes import executor_of, onnx_executor
from octavo.runtimes.onnx_executor import ONNXExecutor

pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")


def noise(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def fast(attentive: DDIMPipeline) -> DDIMPipeline:
    """Attention's products are quantized too."""
    return octavo.accelerate(attentive, runtime="onnx", threads=1)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_parity_with_the_simulation(fast: DDIMPipeline, attentive: DDIMPipeline, rows: int) -> None:
    """Where no value sits on a rounding border the two agree to float32 precision, at any number of images."""
    differences = []
    with torch.no_grad():
        for timestep in range(1, 1000, 60):
            x = noise(rows, seed=timestep)
            differences.append(relative(fast.unet(x, timestep).sample, attentive.unet(x, timestep).sample))
    assert min(differences) < 2e-6
    assert max(differences) < 0.05
    executor = executor_of(fast)
    assert isinstance(executor, ONNXExecutor) and len(executor.graphs) == 1


def test_a_batch_is_cut_into_a_part_for_each_thread(fast: DDIMPipeline, attentive: DDIMPipeline) -> None:
    two = octavo.accelerate(attentive, runtime="onnx", threads=2, batch_size=4)
    executor = executor_of(two)
    assert isinstance(executor, ONNXExecutor)
    assert [graph.parts for graph in executor.graphs.values()] == [2]
    with torch.no_grad():
        x, timesteps = noise(4), torch.tensor([1, 300, 600, 900])
        assert relative(two.unet(x, timesteps).sample, fast.unet(x, timesteps).sample) < 0.05
        two.unet(noise(3), 5)
    assert sorted(graph.parts for graph in executor.graphs.values()) == [1, 2]


def test_all_is_in_int8_by_the_optimized_graph(fast: DDIMPipeline, attentive: DDIMPipeline) -> None:
    rows = octavo.audit(fast)
    layers = [name for name, _ in quantized_layers(attentive.unet)]
    products = [product_name(name) for name, _ in quantized_products(attentive.unet)]
    assert [row.layer for row in rows] == [*layers, *products] and len(products) > 2
    assert {(row.kernel, row.precision) for row in rows} == {("MatMulIntegerToFloat", "i8")}


def test_it_stays_a_drop_in(fast: DDIMPipeline, attentive: DDIMPipeline) -> None:
    assert type(fast) is DDIMPipeline and isinstance(fast.unet, UNet2DModel)
    assert executor_of(attentive) is None
    output = fast.unet(noise(1), 3, return_dict=False)
    assert isinstance(output, tuple)
    assert torch.equal(fast.unet(noise(1), torch.tensor(3)).sample, output[0])
    images = fast(batch_size=3, num_inference_steps=2, generator=generators(0, 0, 3), output_type="np").images
    assert images.shape == (3, 8, 8, 3)


def test_what_computes_is_part_of_what_images_are_named_by(fast: DDIMPipeline) -> None:
    runtime, networks = executed(fast)
    assert runtime == ["onnx", ["f32"], 1, version("onnxruntime")]
    assert networks is not None and list(networks) == ["unet"]


@pytest.fixture
def not_converted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def convert(*_: object) -> None:
        raise AssertionError("it was to be read from the cache")

    monkeypatch.setattr(onnx_executor, "to_onnx", convert)
    yield


def test_the_second_is_from_the_cache(
    fast: DDIMPipeline, attentive: DDIMPipeline, not_converted: None
) -> None:
    again = octavo.accelerate(attentive, runtime="onnx", threads=1)
    with torch.no_grad():
        assert torch.equal(again.unet(noise(2), 9).sample, fast.unet(noise(2), 9).sample)


def test_a_damaged_cache_is_made_again(
    fast: DDIMPipeline, attentive: DDIMPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = executor_of(fast)
    assert isinstance(executor, ONNXExecutor) and executor._folder is not None
    (graph,) = executor._folder.rglob("graph.onnx")
    contents, made = graph.read_bytes(), []
    graph.write_bytes(contents[: len(contents) // 2])
    monkeypatch.setattr(onnx_executor, "to_onnx", lambda *_: made.append("again"))
    monkeypatch.setattr(
        onnx_executor, "save_onnx", lambda _, path: (path.parent.mkdir(), path.write_bytes(contents))
    )
    again = octavo.accelerate(attentive, runtime="onnx", threads=1)
    assert made == ["again"] and all(row.ok for row in octavo.audit(again))
    assert graph.read_bytes() == contents


def test_changed_weights_are_not_converted(fast: DDIMPipeline) -> None:
    executor = executor_of(fast)
    assert executor is not None
    layer = next(layer for _, layer in quantized_layers(executor.denoiser))
    layer.weight_int8.neg_()
    try:
        with pytest.raises(OctavoError, match="accelerate it again"):
            executor(noise(1), 3, class_labels=torch.tensor([1]))
    finally:
        layer.weight_int8.neg_()


def test_what_it_cannot_do_is_said(quantized: DDIMPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OctavoError, match="precision: ONNX Runtime computes what stays float in f32"):
        octavo.accelerate(quantized, runtime="onnx", precision="bf16")
    with pytest.raises(OctavoError, match="runtime: 'tensorrt' is not one of openvino, onnx"):
        octavo.accelerate(quantized, runtime="tensorrt")
    with pytest.raises(OctavoError, match="reuse: the runtime onnx does not reuse features"):
        octavo.accelerate(quantized, runtime="onnx", reuse=object())  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(OctavoError, match=r"pip install -e '.\[onnx\]'"):
        octavo.accelerate(quantized, runtime="onnx")


def test_graphs_of_another_version_have_folders_of_their_own(
    pipeline: DDIMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """ONNX Runtime's graphs are the same on every processor; OpenVINO's: tests/faults/test_disk.py."""

    def folder() -> Path | None:
        return ONNXExecutor(pipeline.unet, cache=tmp_path)._folder

    here = folder()
    assert here is not None and folder() == here
    here.mkdir()
    monkeypatch.setattr(onnx_executor, "FORMAT", "of another version")
    assert folder() not in (None, here)
    ONNXExecutor(pipeline.unet, cache=tmp_path)(torch.zeros(1, 3, 8, 8), 10)
    told = [record.message for record in caplog.records if record.name.startswith("octavo")]
    assert len(told) == 1
    assert told[0].startswith(f"{here}: is of another version or processor; the graphs are made anew")
    monkeypatch.undo()
    versions = onnx_executor.versions
    monkeypatch.setattr(onnx_executor, "versions", lambda *names: {**versions(*names), "onnx": "0"})
    assert folder() not in (None, here)

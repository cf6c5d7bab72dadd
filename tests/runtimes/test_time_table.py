"""The float time embedding as a table in the graph: same numbers, no layers, and other timesteps computed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DiTPipeline

import octavo
from octavo.diffusion import first_call, probe
from octavo.diffusion.samplers import with_scheduler
from octavo.evaluation.generate import generate
from octavo.runtimes import executor_of, time_table
from octavo.runtimes.calls import Call, take_apart
from octavo.runtimes.convert import to_openvino
from octavo.runtimes.core import openvino_core
from octavo.runtimes.kept_graphs import KeptGraphs
from octavo.runtimes.openvino import OpenVINOExecutor
from octavo.runtimes.precision import has_bf16
from octavo.runtimes.time_table import INDEX, with_index, without_index


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def noise(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["float", "weights"])
def embedded(request: pytest.FixtureRequest, pipeline: DDIMPipeline) -> DDIMPipeline:
    """In float, or with integers for the weights alone: a table for either."""
    recipe = octavo.PTQ4DM(
        weights=7, samples=8, steps=4, pairs_per_trajectory=2, time_embedding=request.param
    )
    return octavo.quantize(pipeline, recipe, batch_size=4, progress=False)


@pytest.fixture(scope="module")
def saved_folder(embedded: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedded") / "saved"
    embedded.save_pretrained(folder)
    return folder


def test_saved_loaded_executed_and_audited(embedded: DDIMPipeline, saved_folder: Path) -> None:
    """Plain `from_pretrained` gives the same bits, and the int8 graph has a table of each block's projection."""
    loaded = DDIMPipeline.from_pretrained(saved_folder)
    x = noise(2, 0)
    with torch.no_grad():
        assert torch.equal(loaded.unet(x, 7).sample, embedded.unet(x, 7).sample)
    fast = octavo.accelerate(loaded, precision="f32", batch_size=2)
    rows = octavo.audit(fast)
    assert rows and all(row.ok for row in rows)
    assert not any("time" in row.layer for row in rows)
    differences = []
    with torch.no_grad():
        for timestep in (0, 1, 37, 400, 999):
            for seed in range(3):
                x = noise(2, seed)
                a, b = fast.unet(x, timestep).sample, embedded.unet(x, timestep).sample
                differences.append(relative(a, b))
        each = fast.unet(noise(2, 0), torch.tensor([3, 998])).sample
        alone = [fast.unet(noise(2, 0), t).sample[k] for k, t in enumerate((3, 998))]
    assert min(differences) < 1e-5 and sorted(differences)[len(differences) // 2] < 0.02
    assert torch.equal(each, torch.stack(alone))
    executor = executor_of(fast)
    assert executor is not None and len(executor.graphs) == 1


def test_the_graph_has_tables_and_no_time_layers(embedded: DDIMPipeline) -> None:
    args, kwargs = first_call(embedded, batch_size=2)
    call = take_apart(embedded.unet.forward, args, kwargs)
    model = to_openvino(embedded.unet, call)
    before = sum(op.get_type_name() == "MatMul" for op in model.get_ordered_ops())
    replaced = time_table.tabulate(openvino_core(), model, 1000)
    projections = [name for name, _ in embedded.unet.named_modules() if name.endswith("time_emb_proj")]
    assert len(replaced) == len(projections) > 4
    after = sum(op.get_type_name() == "MatMul" for op in model.get_ordered_ops())
    assert before - after == len(projections) + 2  # and the MLP's two, which nothing reads any more
    assert [port.get_any_name() for port in model.inputs][-1] == INDEX


def test_fractional_and_foreign_timesteps_are_computed(
    pipeline: DDIMPipeline, embedded: DDIMPipeline
) -> None:
    fast = octavo.accelerate(pipeline, precision="f32", batch_size=1)
    executor = executor_of(fast)
    assert executor is not None
    with torch.no_grad():
        for timestep in (12, 12.25, 1000, -1, 3.0):
            t = torch.tensor(timestep)
            assert relative(fast.unet(noise(1, 1), t).sample, pipeline.unet(noise(1, 1), t).sample) < 1e-5
    assert len(executor.graphs) == 2


@pytest.mark.parametrize("timesteps", [(12, 12.25, 3.0), (12.25, 12, 0.5)])
def test_without_tables_one_graph_serves_all_timesteps(
    quantized: DDIMPipeline, timesteps: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever comes first; the second time from the cache."""
    converted = []
    convert = KeptGraphs.converted

    def count(self: KeptGraphs, call: Call) -> Any:
        converted.append(call)
        return convert(self, call)

    monkeypatch.setattr(KeptGraphs, "converted", count)
    for _ in range(2):
        executor = OpenVINOExecutor(quantized.unet, precision="f32")
        del converted[:]
        with torch.no_grad():
            for timestep in timesteps:
                ours = executor(noise(1, 1), timestep).sample
                assert relative(ours, quantized.unet(noise(1, 1), timestep).sample) < 0.05
        assert len(executor.graphs) == 1 and len(converted) == 1


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")
def test_a_sampler_between_whole_timesteps_has_one_graph(embedded: DDIMPipeline) -> None:
    """Its first timestep and its last are whole; a graph with tables for those two would be a second one."""
    euler = with_scheduler(embedded, "euler")
    fast = octavo.accelerate(euler, precision="f32", batch_size=2)
    generate(fast, 2, steps=6, batch_size=2, progress=False)
    timesteps = probe(euler, num_inference_steps=6).timesteps
    assert timesteps[0] == 999 and any(t % 1 for t in timesteps)
    executor = executor_of(fast)
    assert executor is not None and len(executor.graphs) == 1


def test_a_quantized_embedding_is_left_to_run(quantized: DDIMPipeline) -> None:
    args, kwargs = first_call(quantized)
    model = to_openvino(quantized.unet, take_apart(quantized.unet.forward, args, kwargs))
    assert time_table.tabulate(openvino_core(), model, 1000) == []


def test_class_labels_leave_a_table_of_the_mlp(dit: DiTPipeline) -> None:
    args, kwargs = first_call(dit, batch_size=1, inputs={"class_labels": [1], "guidance_scale": 2.0})
    call = take_apart(dit.transformer.forward, args, kwargs)
    model = to_openvino(dit.transformer, call)
    replaced = time_table.tabulate(openvino_core(), model, 50)
    assert replaced and all("timestep_embedder.linear_2" in name for name in replaced)
    fast = octavo.accelerate(
        dit, precision="f32", batch_size=1, inputs={"class_labels": [1], "guidance_scale": 2.0}
    )
    with torch.no_grad():
        assert relative(fast.transformer(**kwargs).sample, dit.transformer(**kwargs).sample) < 1e-5


def test_a_table_that_is_too_large_is_not_made(
    pipeline: DDIMPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time_table, "MOST_BYTES", 1000)
    args, kwargs = first_call(pipeline)
    model = to_openvino(pipeline.unet, take_apart(pipeline.unet.forward, args, kwargs))
    assert time_table.tabulate(openvino_core(), model, 1000) == []
    assert INDEX not in [port.get_any_name() for port in model.inputs]


def test_a_call_and_its_index(pipeline: DDIMPipeline) -> None:
    call = take_apart(pipeline.unet.forward, (noise(3, 0), 999), {})
    found = with_index(call, 1000)
    assert found.tensors[-1].dtype == torch.int32 and found.tensors[-1].tolist() == [999] * 3
    assert found.part(1, 3)[-1].tolist() == [999]
    assert without_index(found) == call
    assert with_index(call, 999) is call and with_index(call, 0) is call


@pytest.mark.parametrize("kind", ["quantized", "float"])
def test_timesteps_stay_what_they_are_in_bf16(pipeline: DDIMPipeline, kind: str) -> None:
    """Which has 3 numbers for the 8 from 985 to 992; those that are not whole are computed in the graph."""
    if not has_bf16(openvino_core()):
        pytest.skip("this CPU does not compute in bf16")
    attentive = copy.copy(pipeline)
    attentive.unet = copy.deepcopy(pipeline.unet)
    for name, layer in attentive.unet.named_modules():
        if name.endswith("time_emb_proj"):
            layer.weight.data *= 20  # a network that listens to the timestep
    if kind == "quantized":
        attentive = octavo.quantize(
            attentive, octavo.PTQ4DM(weights=7, samples=8, steps=4), batch_size=4, progress=False
        )
    fast = octavo.accelerate(attentive, precision="bf16", threads=1)
    x = noise(1, 0)
    for timesteps in ((985, 986, 987, 988, 990), (985.5, 986.5, 987.5, 988.5)):
        with torch.no_grad():
            outputs = [fast.unet(x, torch.tensor(t)).sample for t in timesteps]
            for output, t in zip(outputs, timesteps, strict=True):
                assert relative(output, attentive.unet(x, torch.tensor(t)).sample) < 0.06
        assert len({tuple(output.flatten().tolist()) for output in outputs}) == len(timesteps)

"""Scales by timestep in real int8: one graph, which finds each row's group by its own timestep input."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from diffusers import DDIMPipeline, DiTPipeline

import octavo
from octavo.calibration.operations import attach_timestep_groups
from octavo.diffusion import first_call
from octavo.quantization import TimestepGroups, quantized_layers
from octavo.runtimes.accelerate import executor_of
from octavo.runtimes.core import openvino_core
from octavo.runtimes.precision import has_bf16
from octavo.runtimes.reuse.networks import recording, reusing

RECIPE = octavo.PTQ4DM(
    weights=7,
    samples=40,
    steps=4,
    pairs_per_trajectory=4,
    timesteps="uniform",
    timestep_groups=2,
    balance=True,
)


def exaggerated(pipeline: DDIMPipeline) -> DDIMPipeline:
    """Each group's range 16 times narrower than that of the group before it: a wrong group is far off."""
    for _, layer in quantized_layers(pipeline.unet):
        if layer.timestep_factor is not None:
            layer.timestep_factor *= 16.0 ** torch.arange(len(layer.timestep_factor))
    return pipeline


@pytest.fixture(scope="module")
def grouped(pipeline: DDIMPipeline) -> DDIMPipeline:
    """Some of its layers are balanced too."""
    ours = octavo.quantize(pipeline, RECIPE, batch_size=20, progress=False)
    layers = [layer for _, layer in quantized_layers(ours.unet) if layer.timestep_factor is not None]
    assert sum(layer.input_multiplier is not None for layer in layers) > 0
    return exaggerated(ours)


def test_every_layer_runs_in_int8_and_each_row_in_its_group(grouped: DDIMPipeline) -> None:
    fast = octavo.accelerate(grouped, precision="f32", threads=1, batch_size=3)
    assert all(row.ok for row in octavo.audit(fast))
    border = float(grouped.unet.octavo_operations["timestep_groups"].borders[0])
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        early, late = (grouped.unet(x, t).sample for t in (0, 999))
        moved = grouped.unet(x, border + 1).sample - grouped.unet(x, border - 1).sample
        assert moved.norm() > 0.1 * early.norm()
        for timestep in (0, 999, border - 1, border + 1, torch.tensor([0, 999, 0])):
            simulated, executed = grouped.unet(x, timestep).sample, fast.unet(x, timestep).sample
            assert (executed - simulated).norm() < 0.04 * simulated.norm()
        torch.testing.assert_close(simulated[1], late[1])
        torch.testing.assert_close(simulated[[0, 2]], early[[0, 2]])
    executor = executor_of(fast)
    assert executor is not None and len(executor.graphs) == 1


def test_a_border_holds_in_bf16_too(quantized: DDIMPipeline) -> None:
    """In which 990 is 992."""
    if not has_bf16(openvino_core()):
        pytest.skip("this CPU does not compute in bf16")
    cut = copy.copy(quantized)
    cut.unet = copy.deepcopy(quantized.unet)
    factors = {name: torch.tensor([1.0, 16.0]) for name, _ in quantized_layers(cut.unet)}
    attach_timestep_groups(cut.unet, TimestepGroups(torch.tensor([990.5])), factors)
    fast = octavo.accelerate(cut, precision="bf16", threads=1, batch_size=3)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for timestep in (989, 990, 991, 992):
        with torch.no_grad():
            simulated, executed = cut.unet(x, timestep).sample, fast.unet(x, timestep).sample
        assert (executed - simulated).norm() < 0.15 * simulated.norm(), timestep


def test_a_call_that_fails_ends_too(grouped: DDIMPipeline) -> None:
    with pytest.raises(TypeError):
        grouped.unet(torch.zeros(1, 3, 8, 8), 10, added_cond_kwargs={})
    with pytest.raises(RuntimeError):
        grouped.unet(torch.zeros(1, 5, 8, 8), 10)
    layer = next(layer for _, layer in quantized_layers(grouped.unet) if layer.timestep_factor is not None)
    assert layer.current_group.index is None


def test_onnx_runtime_finds_the_group_too(grouped: DDIMPipeline) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    fast = octavo.accelerate(grouped, runtime="onnx", threads=1)
    assert all(row.ok for row in octavo.audit(fast))
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for timestep in (0, 999, torch.tensor([0, 999, 0])):
            simulated, executed = grouped.unet(x, timestep).sample, fast.unet(x, timestep).sample
            assert (executed - simulated).norm() < 0.04 * simulated.norm()


def test_weights_are_stored_once(grouped: DDIMPipeline, quantized: DDIMPipeline) -> None:
    sizes = [
        sum(tensor.numel() for tensor in other.unet.state_dict().values() if tensor.dtype == torch.int8)
        for other in (grouped, quantized)
    ]
    assert sizes[0] == sizes[1] > 0


def test_parts_of_the_network_that_reuse_features_know_the_group_too(grouped: DDIMPipeline) -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    whole, outer = recording(grouped.unet, 1), reusing(grouped.unet, 1)
    with torch.no_grad():
        for timestep in (0, torch.tensor([999, 0])):
            expected = grouped.unet(x, timestep).sample
            output, deep = whole(x, timestep)
            torch.testing.assert_close(output, expected)
            torch.testing.assert_close(outer(x, timestep, deep_features=deep)[0], expected)


def test_a_guided_transformer(dit: DiTPipeline) -> None:
    """Its rows are doubled by guidance; the table's rows are the network's."""
    inputs = {"class_labels": [1, 2, 3]}
    recipe = dataclasses.replace(RECIPE, activations=5, balance=False)
    int8 = octavo.quantize(dit, recipe, batch_size=8, inputs={"class_labels": [1]}, progress=False)
    layers = [layer for _, layer in quantized_layers(int8.transformer) if layer.timestep_factor is not None]
    assert layers
    fast = octavo.accelerate(int8, precision="f32", threads=1, batch_size=3, inputs=inputs)
    assert all(row.ok for row in octavo.audit(fast))
    _, kwargs = first_call(dit, batch_size=3, inputs=inputs)
    for timestep in (999, 10):
        call = {**kwargs, "timestep": torch.full_like(kwargs["timestep"], timestep)}
        with torch.no_grad():
            simulated, executed = (net(**call).sample for net in (int8.transformer, fast.transformer))
        assert (executed - simulated).norm() < 0.05 * simulated.norm()

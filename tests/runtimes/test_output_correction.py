"""A corrected output in real int8: the timestep is an input of the graph, so one graph corrects every timestep."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DiTPipeline, PNDMScheduler

import octavo
from octavo.calibration import OUTPUT_CORRECTION, attach_operations, output_correction_of
from octavo.diffusion import first_call
from octavo.evaluation.generate import generate
from octavo.quantization import OutputCorrection, quantized_layers
from octavo.runtimes import executor_of
from octavo.runtimes.calls import take_apart
from octavo.runtimes.convert import to_openvino
from octavo.runtimes.edges import float_edges, layer_of

INPUTS = {"class_labels": [1, 5, 7], "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def plain(pipeline: DDIMPipeline) -> DDIMPipeline:
    """Weights of 7 bits: exact in every kernel."""
    recipe = octavo.PTQ4DM(weights=7, samples=8, steps=4)
    quantized: DDIMPipeline = octavo.quantize(pipeline, recipe, batch_size=4, progress=False)
    return quantized


@pytest.fixture(scope="module")
def corrected(plain: DDIMPipeline) -> DDIMPipeline:
    """With a table whose ends differ by more than any rounding."""
    other = copy.copy(plain)
    other.unet = copy.deepcopy(plain.unet)
    mean = torch.tensor([[1.0, -1.0, 0.0], [0.0, 4.0, -8.0]]).view(2, 3, 1, 1)
    table = OutputCorrection(torch.tensor([100.0, 900.0]), torch.tensor([0.5, -0.5]), mean)
    attach_operations(other.unet, {OUTPUT_CORRECTION: table})
    return other


def test_one_graph_gives_what_the_simulation_gives_at_every_timestep(
    plain: DDIMPipeline, corrected: DDIMPipeline
) -> None:
    fast = octavo.accelerate(corrected, precision="f32", threads=1, batch_size=3)
    rows = octavo.audit(fast)
    assert rows and all(row.ok for row in rows)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for timestep in (0, 100, 500, 900, 999, torch.tensor([900, 100, 420])):
        with torch.no_grad():
            simulated, uncorrected = corrected.unet(x, timestep).sample, plain.unet(x, timestep).sample
            executed = fast.unet(x, timestep).sample
        assert (simulated - uncorrected).norm() > 0.5 * uncorrected.norm()
        assert (executed - simulated).norm() < 0.03 * simulated.norm()
    executor = executor_of(fast)
    assert executor is not None and len(executor.graphs) == 1


def test_the_converted_graph_is_kept(corrected: DDIMPipeline) -> None:
    """The correction's hook is Octavo's own code, which a cache can name."""
    fast = octavo.accelerate(corrected, precision="f32", threads=1)
    executor = executor_of(fast)
    assert executor is not None and executor.kept.folder is not None
    other = executor_of(octavo.accelerate(corrected, precision="f32", threads=1))
    assert other is not None and other.kept.folder == executor.kept.folder


def test_the_last_layer_is_found_behind_it(corrected: DDIMPipeline) -> None:
    """It stays in f32 where the rest is bf16, so the correction must not look like the last layer."""
    _, kwargs = first_call(corrected, batch_size=2)
    model = to_openvino(corrected.unet, take_apart(corrected.unet.forward, (), kwargs))
    found = float_edges(model, [name for name, _ in quantized_layers(corrected.unet)])
    assert [layer_of(name) for name in found] == ["conv_in", "conv_out"]


def test_any_scheduler_takes_it(corrected: DDIMPipeline, plain: DDIMPipeline) -> None:
    """The correction is the network's: to a multistep scheduler it is as if the sampler had made it."""
    correction = output_correction_of(corrected.unet)
    assert correction is not None

    def by_hand(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return correction(plain.unet(x, t).sample, t)

    images = []
    for network in (by_hand, lambda x, t: corrected.unet(x, t).sample):
        scheduler = PNDMScheduler()
        scheduler.set_timesteps(4)
        x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
        images.append(x)
    assert torch.equal(*images)


def test_a_class_conditional_guided_network_with_a_learned_variance(dit: DiTPipeline, tmp_path: Path) -> None:
    recipe = octavo.PTQ4DM(
        weights=3, activations=6, samples=8, pairs_per_trajectory=1, steps=2, output_correction=True
    )
    int8 = octavo.quantize(dit, recipe, batch_size=4, inputs=INPUTS, progress=False)
    correction = output_correction_of(int8.transformer)
    assert correction is not None and correction.mean.shape[1:] == (4, 1, 1)
    correction.mean += 3.0  # seen in the prediction whatever was measured
    before = copy.deepcopy(int8.transformer)
    before.octavo_operations.pop(OUTPUT_CORRECTION)
    fast = octavo.accelerate(int8, precision="f32", threads=1, batch_size=3, inputs=INPUTS)
    _, kwargs = first_call(dit, batch_size=3, inputs=INPUTS)
    for timestep in (999, 10):
        call = {**kwargs, "timestep": torch.full_like(kwargs["timestep"], timestep)}
        with torch.no_grad():
            plain, simulated, executed = (
                network(**call).sample for network in (before, int8.transformer, fast.transformer)
            )
        assert torch.equal(simulated[:, 4:], plain[:, 4:])
        assert float((simulated - plain)[:, :4].mean()) < -1
        assert (executed - simulated).norm() < 0.05 * simulated.norm()
    assert generate(fast, 3, steps=2, inputs=INPUTS, progress=False).shape == (3, 8, 8, 3)
    int8.save_pretrained(tmp_path / "dit")
    loaded = octavo.load(tmp_path / "dit")
    common = {"steps": 2, "inputs": INPUTS, "progress": False}
    assert (generate(loaded, 3, **common) == generate(int8, 3, **common)).all()

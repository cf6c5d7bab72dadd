from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline

from octavo.errors import OctavoError
from octavo.evaluation.layer_error import layer_errors
from octavo.evaluation.trajectory import TrajectoryStep, trajectory


@pytest.fixture(scope="module")
def steps(pipeline: DDIMPipeline) -> list[TrajectoryStep]:
    return trajectory(pipeline, num_images=2, steps=3)


def test_a_trajectory_is_what_the_network_was_handed(pipeline: DDIMPipeline) -> None:
    seen: list[tuple[torch.Tensor, float]] = []
    hook = pipeline.unet.register_forward_pre_hook(
        lambda module, args: seen.append((args[0].clone(), float(args[1])))
    )
    try:
        found = trajectory(pipeline, num_images=1, steps=4, seed=3)
    finally:
        hook.remove()
    assert [step.step for step in found] == [0, 1, 2, 3]
    for step, (sample, timestep) in zip(found, seen[-4:], strict=True):
        assert step.timestep == timestep and torch.equal(step.calls[0]["sample"], sample)


def test_long_trajectories_keep_both_ends(pipeline: DDIMPipeline) -> None:
    found = trajectory(pipeline, num_images=1, steps=9, max_steps=3)
    assert [step.step for step in found] == [0, 4, 8]


def test_errors_are_those_of_each_layer_alone(pipeline, quantized, steps) -> None:  # type: ignore[no-untyped-def]
    found = layer_errors(quantized.unet, pipeline.unet, steps)
    name = "mid_block.resnets.0.conv1"
    caught: list[tuple[torch.Tensor, torch.Tensor]] = []
    layer = pipeline.unet.get_submodule(name)
    hook = layer.register_forward_hook(lambda module, args, output: caught.append((args[0], output)))
    with torch.no_grad():
        for step in steps:
            pipeline.unet(**step.calls[0])
    hook.remove()
    with torch.no_grad():
        expected = [float((quantized.unet.get_submodule(name)(x) - y).norm() / y.norm()) for x, y in caught]
    assert found.timesteps == tuple(step.timestep for step in steps)
    assert found.errors[found.layers.index(name)] == pytest.approx(expected, rel=1e-5)
    assert np.nanmin(found.errors) > 0 and np.nanmax(found.errors) < 0.5
    means = found.errors.mean(axis=1)[found.worst()]
    assert np.all(np.diff(means) <= 0) and means[0] > means[-1]


def test_layers_run_in_the_networks_order_and_nothing_is_left(pipeline, quantized, steps) -> None:  # type: ignore[no-untyped-def]
    found = layer_errors(quantized.unet, pipeline.unet, steps)
    assert found.layers[0].startswith("time_embedding") and found.layers[-1].startswith("up_blocks")
    assert not any(module._forward_hooks for module in pipeline.unet.modules())
    pipeline.unet.train()
    layer_errors(quantized.unet, pipeline.unet, steps[:1])
    assert pipeline.unet.training
    pipeline.unet.eval()


def test_models_that_do_not_belong_together_are_told(pipeline, quantized, steps) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(OctavoError, match="has no layer"):
        layer_errors(quantized.unet, torch.nn.Linear(2, 2), steps)
    elsewhere = copy.copy(pipeline.unet)
    elsewhere.forward = lambda **call: None  # as an accelerated network's: no layer of torch's runs
    with pytest.raises(OctavoError, match="accelerated"):
        layer_errors(quantized.unet, elsewhere, steps)
    with pytest.raises(OctavoError, match="num_images"):
        trajectory(pipeline, num_images=0)

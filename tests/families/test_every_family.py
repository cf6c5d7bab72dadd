"""Nine families of pipelines through the whole path: quantize, save, plain from_pretrained, accelerate, sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from tiny_families import FAMILIES, build

import octavo
from octavo.diffusion import call_pipeline, find_denoiser, first_call, generators
from octavo.diffusion.exchange import exchange_scheduler

# diffusers' schedulers hand a torch tensor to np.array, of which torch 2.13 and NumPy 2 together warn.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
NOISE_SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {},
    "EulerDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "HeunDiscreteScheduler": {},
}
FLOW_SCHEDULERS: dict[str, dict[str, Any]] = {
    "FlowMatchEulerDiscreteScheduler": {},
    "FlowMatchHeunDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": FLOW,
    "UniPCMultistepScheduler": FLOW,
    "DEISMultistepScheduler": FLOW,
}
# FluxPipeline computes the sigmas itself, which only these two take.
SCHEDULERS = {
    "sd3": FLOW_SCHEDULERS,
    "flux": {
        "FlowMatchEulerDiscreteScheduler": {"use_dynamic_shifting": True},
        "UniPCMultistepScheduler": FLOW,
    },
}


@dataclass
class Family:
    name: str
    inputs: dict[str, Any]
    original: Any
    quantized: Any
    loaded: Any
    fast: Any


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: Any, tmp_path_factory: Any) -> Iterator[Family]:
    original, inputs = build(request.param)
    recipe = octavo.PTQ4DM(samples=3, steps=3)
    quantized = octavo.quantize(original, recipe, batch_size=3, inputs=inputs, progress=False)
    folder = tmp_path_factory.mktemp(request.param) / "int8"
    quantized.save_pretrained(folder)
    loaded = diffusers.DiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    fast = octavo.accelerate(loaded, precision="f32", batch_size=3, inputs=inputs)
    yield Family(request.param, inputs, original, quantized, loaded, fast)


def evaluate(pipeline: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The denoiser's output at the first call for three images."""
    args, kwargs = first_call(pipeline, batch_size=3, inputs=inputs)
    with torch.no_grad():
        output: torch.Tensor = find_denoiser(pipeline)[1](*args, **{**kwargs, "return_dict": False})[0]
    return output


def sample(pipeline: Any, inputs: dict[str, Any], steps: int = 3) -> Any:
    return call_pipeline(
        pipeline, generators=generators(0, 0, 3), num_inference_steps=steps, inputs=inputs, output_type="np"
    )


def test_every_quantized_layer_runs_in_int8(family: Family) -> None:
    rows = octavo.audit(family.fast)
    assert len(rows) > 15 and all(row.ok for row in rows)
    assert type(family.loaded) is type(family.original) is type(family.fast)
    _, denoiser = find_denoiser(family.loaded)
    assert type(denoiser) is type(find_denoiser(family.original)[1])


def test_one_evaluation_is_the_simulations(family: Family) -> None:
    exact, made, simulated, executed = (
        evaluate(pipeline, family.inputs)
        for pipeline in (family.original, family.quantized, family.loaded, family.fast)
    )
    assert torch.equal(made, simulated)
    error = (simulated - exact).norm()
    assert 0 < error < 0.1 * exact.norm()
    assert (executed - simulated).norm() < 0.5 * error


def test_images_are_the_simulations_by_every_scheduler(family: Family) -> None:
    for name, settings in SCHEDULERS.get(family.name, NOISE_SCHEDULERS).items():
        scheduler = getattr(diffusers, name).from_config(family.original.scheduler.config, **settings)
        exact, simulated, executed = (
            sample(exchange_scheduler(pipeline, scheduler), family.inputs)
            for pipeline in (family.original, family.loaded, family.fast)
        )
        assert exact.shape == (3, 16, 16, 3) and np.isfinite(executed).all()
        error = np.linalg.norm(simulated - exact)
        assert 0 < error and np.linalg.norm(executed - simulated) < 0.5 * error, name

"""Families of pipelines through the whole path: quantize, save, plain from_pretrained, accelerate, sample."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from tiny_families import FAMILIES, build

import octavo
from octavo.calibration import trace
from octavo.diffusion import (
    call_pipeline,
    capture_pairs,
    find_denoiser,
    first_call,
    generators,
    inputs_of_images,
    probe,
)
from octavo.diffusion.exchange import exchange_scheduler
from octavo.diffusion.samplers import with_scheduler
from octavo.quantization import QuantConv3d, integer_layers, quantized_layers
from octavo.runtimes import convert
from octavo.runtimes.saturation import adds_in_16_bits

# diffusers' schedulers hand torch tensors to NumPy, of which torch 2.13 and NumPy 2 together warn.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}:DeprecationWarning")
    for message in (
        "__array__ implementation doesn't accept a copy keyword",
        "__array_wrap__ must accept context and return_scalar arguments",
    )
]

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
FIVE = ("DDIM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "HeunDiscrete")
TWELVE = (
    *FIVE,
    "DDPM",
    "PNDM",
    "LMSDiscrete",
    "EulerAncestralDiscrete",
    "DPMSolverSinglestep",
    "KDPM2Discrete",
    "DEISMultistep",
)
"""The matrix: each under a UNet2DModel, a UNet2DConditionModel and a DiT."""
SCHEDULERS: dict[str, tuple[str, ...]] = {
    "unconditional": TWELVE,
    "sd": TWELVE,
    "dit": TWELVE,
    "sd3": (
        "FlowMatchEulerDiscrete",
        "FlowMatchHeunDiscrete",
        "DPMSolverMultistep",
        "UniPCMultistep",
        "DEISMultistep",
    ),
    "flux": (
        "FlowMatchEulerDiscrete",
        "UniPCMultistep",
        "DPMSolverMultistep",
        "DPMSolverSinglestep",
        "DEISMultistep",
    ),
    "ltx": ("FlowMatchEulerDiscrete", "UniPCMultistep"),  # of five, those that take the pipeline's own sigmas
    "video_unet": FIVE,
    "svd": ("EulerDiscrete",),  # the one whose timesteps are of the noise's logarithm
}
SHAPES = {"svd": (3, 2, 16, 16, 3), "ltx": (3, 5, 32, 32, 3), "video_unet": (3, 2, 16, 16, 3)}
STEPS = {"PNDM": 4}  # which begins with four of Runge-Kutta
REFUSED = {"unconditional": {"LMSDiscrete", "KDPM2Discrete"}}
"""Schedulers that scale the network's input, which an unconditional pipeline does not do."""


TWO_KERNELS = ("video_unet", "dit")
"""Of any 8-bit weights: two kernels a layer on CPUs without VNNI; the others are as these are told to take."""


@dataclass
class Family:
    name: str
    inputs: dict[str, Any]
    original: Any
    quantized: Any
    loaded: Any
    fast: Any
    without_evaluation: list[bool]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: Any, tmp_path_factory: Any) -> Iterator[Family]:
    original, inputs = build(request.param)
    limited = adds_in_16_bits() and request.param not in TWO_KERNELS
    recipe = octavo.PTQ4DM(samples=3, steps=3, pair_limit=limited)
    quantized = octavo.quantize(original, recipe, batch_size=3, inputs=inputs, progress=False)
    folder = tmp_path_factory.mktemp(request.param) / "int8"
    quantized.save_pretrained(folder)
    loaded = diffusers.DiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    traces: list[bool] = []
    real = convert.tried

    def noted(*args: Any) -> Any:
        traced = real(*args)
        traces.append(traced is not None)
        return traced

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(convert, "tried", noted)
        fast = octavo.accelerate(loaded, precision="f32", batch_size=3, inputs=inputs)
    yield Family(request.param, inputs, original, quantized, loaded, fast, traces)


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


def assert_the_same(family: Family, results: Any, which: str = "") -> None:
    """The executed result is the simulation's, measured by what quantization does to the exact one.

    Of a U-Net not more can be asked than to be about as near to the simulation as that is to full precision: where
    float32 sums differ in their last bit some activation is rounded the other way, and in an untrained network every
    layer below then rounds anew (roundings of its own throughout would be sqrt(2) away; on a CPU without VNNI, in two
    kernels a layer, 1.02 was seen). Transformers hold their own.
    """
    exact, simulated, executed = (np.asarray(result) for result in results)
    error = np.linalg.norm(simulated - exact)
    share = 1.2 if hasattr(family.loaded, "unet") else 0.2
    assert error > 0, which
    assert not np.array_equal(executed, simulated), (
        f"{which}: only what was not executed has the simulation's bits"
    )
    assert np.linalg.norm(executed - simulated) < share * error, which
    assert np.linalg.norm(executed - exact) < 1.25 * error, which


def test_it_is_traced_without_an_evaluation(family: Family) -> None:
    assert family.without_evaluation and all(family.without_evaluation)


def test_every_quantized_layer_runs_in_int8(family: Family) -> None:
    rows = octavo.audit(family.fast)
    assert len(rows) > 15 and all(row.ok for row in rows)
    layers, integers = (
        {name for name, _ in found(find_denoiser(family.loaded)[1])}
        for found in (quantized_layers, integer_layers)
    )
    assert {row.layer for row in rows} == integers
    assert all("time_pos_embed" in name for name in layers - integers), (
        "but what reads the frames' numbers alone"
    )
    seen = trace(family.original, family.inputs)
    assert set(seen.executed) - layers == set(seen.edges), (
        "all but what reads the image and writes the output"
    )
    assert type(family.loaded) is type(family.original) is type(family.fast)
    _, denoiser = find_denoiser(family.loaded)
    assert type(denoiser) is type(find_denoiser(family.original)[1])


def test_all_but_the_denoiser_keeps_its_bits(family: Family) -> None:
    """VAE and text encoders among them; plain diffusers loads them as they were."""
    component, _ = find_denoiser(family.original)
    for name, network in family.original.components.items():
        if name == component or not isinstance(network, torch.nn.Module):
            continue
        kept = network.state_dict()
        for pipeline in (family.quantized, family.loaded, family.fast):
            other = getattr(pipeline, name)
            assert not dict(quantized_layers(other)), name
            assert other.state_dict().keys() == kept.keys(), name
            assert all(torch.equal(tensor, kept[key]) for key, tensor in other.state_dict().items()), name


OTHER_SIZES = {"sd": (32, 16), "sdxl": (32, 16), "sd3": (32, 16), "flux": (32, 16), "pixart": (32, 16)}


def test_sizes_that_calibration_did_not_see_are_the_simulations(family: Family) -> None:
    if family.name not in OTHER_SIZES:
        pytest.skip("its size is fixed, or is that of a picture")
    height, width = OTHER_SIZES[family.name]
    inputs = {**family.inputs, "height": height, "width": width}
    exact, simulated, executed = (
        evaluate(pipeline, inputs) for pipeline in (family.original, family.loaded, family.fast)
    )
    assert exact.shape != evaluate(family.original, family.inputs).shape
    assert_the_same(family, (exact, simulated, executed))


def test_convolutions_over_time_are_quantized(family: Family) -> None:
    _, denoiser = find_denoiser(family.loaded)
    over_time = [name for name, layer in quantized_layers(denoiser) if isinstance(layer, QuantConv3d)]
    assert (len(over_time) >= 10) == (family.name in ("video_unet", "svd"))
    _, original = find_denoiser(family.original)
    assert len(over_time) == sum(isinstance(module, torch.nn.Conv3d) for module in original.modules())


def test_one_evaluation_is_the_simulations(family: Family) -> None:
    exact, made, simulated, executed = (
        evaluate(pipeline, family.inputs)
        for pipeline in (family.original, family.quantized, family.loaded, family.fast)
    )
    assert torch.equal(made, simulated)
    assert (simulated - exact).norm() < 0.1 * exact.norm()
    assert_the_same(family, (exact, simulated, executed))


def under(pipeline: Any, scheduler: str) -> Any:
    """The pipeline by another scheduler of diffusers, as its users exchange it."""
    name = f"{scheduler}Scheduler"
    if type(pipeline).__name__ == "DDIMPipeline":
        return with_scheduler(pipeline, name)
    flow = type(pipeline.scheduler).__name__.startswith("FlowMatch") and not name.startswith("FlowMatch")
    kind = getattr(diffusers, name)
    return exchange_scheduler(pipeline, kind.from_config(pipeline.scheduler.config, **(FLOW if flow else {})))


def test_images_are_the_simulations_by_every_scheduler(family: Family) -> None:
    for scheduler in SCHEDULERS.get(family.name, FIVE):
        if scheduler in REFUSED.get(family.name, ()):
            with pytest.raises(octavo.OctavoError, match=f"^scheduler: {scheduler}"):
                under(family.loaded, scheduler)
            continue
        exact, simulated, executed = (
            sample(under(pipeline, scheduler), family.inputs, STEPS.get(scheduler, 3))
            for pipeline in (family.original, family.loaded, family.fast)
        )
        assert exact.shape == SHAPES.get(family.name, (3, 16, 16, 3))
        assert np.isfinite(executed).all(), scheduler
        assert_the_same(family, (exact, simulated, executed), scheduler)


def test_a_run_that_starts_from_an_image_is_the_simulations(family: Family) -> None:
    """At a strength below 1, of which the pipeline makes a part of its steps."""
    if "strength" not in inspect.signature(type(family.original).__call__).parameters:
        pytest.skip("the pipeline starts from noise alone")
    results = (
        sample(pipeline, {**family.inputs, "strength": 0.5}, steps=6)
        for pipeline in (family.original, family.loaded, family.fast)
    )
    assert_the_same(family, results, "strength")


def test_calibration_sees_every_step_of_every_scheduler(family: Family) -> None:
    for scheduler in SCHEDULERS.get(family.name, FIVE):
        if scheduler in REFUSED.get(family.name, ()):
            continue
        pipeline = under(family.original, scheduler)
        num_steps = STEPS.get(scheduler, 2)
        seen = probe(pipeline, num_inference_steps=num_steps, inputs=family.inputs)
        steps = range(seen.num_steps, 0, -1)
        pairs = capture_pairs(
            pipeline,
            [list(steps)],
            generators=generators(0, 0, 1),
            num_inference_steps=num_steps,
            inputs=inputs_of_images(family.inputs, [0]),
        )
        assert [pair.steps_left for pair in pairs] == list(steps), scheduler
        timesteps = [float(torch.as_tensor(pair.args["timestep"]).flatten()[0]) for pair in pairs]
        unit = 1000 if family.name == "flux" else 1  # FLUX is told the time from 0 to 1
        np.testing.assert_allclose(np.multiply(timesteps, unit), seen.timesteps, rtol=1e-4)

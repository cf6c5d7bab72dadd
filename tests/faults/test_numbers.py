"""NaN and infinity, layers that nothing reaches, constants, nothing at all: each has a defined answer."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline
from tiny import tiny_pipeline

import octavo
from octavo.calibration import calibrate, quantize_observed, trace
from octavo.calibration.collect import PairStore
from octavo.calibration.observations import observe
from octavo.errors import OctavoError
from octavo.quantization import HistogramObserver, QuantSpec, quantized_layers, walk

RECIPE = octavo.PTQ4DM(samples=2, steps=2)
BAD = (float("nan"), float("inf"))
WITHOUT_ONNX = pytest.mark.skipif("not __import__('importlib').util.find_spec('onnxruntime')")
RUNTIMES = ("openvino", pytest.param("onnx", marks=WITHOUT_ONNX))


def _quantized(pipeline: DDIMPipeline, tmp_path: Path, recipe: octavo.PTQ4DM = RECIPE) -> DDIMPipeline:
    return octavo.quantize(pipeline, recipe, progress=False, workdir=tmp_path)


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> DDIMPipeline:
    return _quantized(tiny_pipeline(), tmp_path_factory.mktemp("int8"))


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", ["conv_in.weight", "conv_norm_out.bias", "mid_block.resnets.0.conv1.weight"])
def test_weights_that_are_no_numbers_are_named(tmp_path: Path, name: str, value: float) -> None:
    pipeline = tiny_pipeline()
    pipeline.unet.get_parameter(name).data.view(-1)[3] = value
    with pytest.raises(OctavoError, match=rf"unet: {name}: holds NaN or infinity"):
        _quantized(pipeline, tmp_path)
    assert not any(tmp_path.iterdir())


def test_activations_that_overflow_name_their_layer(tmp_path: Path) -> None:
    """Weights are finite, what they give is not."""
    pipeline = tiny_pipeline()
    pipeline.unet.conv_in.weight.data.fill_(3e38)
    with pytest.raises(OctavoError, match=r"down_blocks.*NaN or infinity.*overflows"):
        _quantized(pipeline, tmp_path)


@pytest.mark.parametrize("value", BAD)
def test_observers_count_nothing_of_what_is_no_number(value: float) -> None:
    observer = HistogramObserver()
    observer.observe(torch.ones(3))
    before = observer.state()
    with pytest.raises(OctavoError, match="NaN or infinity"):
        observer.observe(torch.tensor([2.0, value]))
    assert all(torch.equal(observer.state()[name], kept) for name, kept in before.items())


def test_the_simulation_gives_nan_for_nan_and_saturates_at_infinity(int8: DDIMPipeline) -> None:
    """As the float network would; never a picture that looks well."""
    layer = dict(quantized_layers(int8.unet))["mid_block.resnets.0.conv1"]
    x = torch.randn(1, layer.in_channels, 4, 4, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0, 0] = float("nan")
    assert bool(layer(x)[0, :, 0, 0].isnan().all()) and bool(layer(x)[0, :, 3, 3].isfinite().all())
    x[0, 0, 0, 0] = float("inf")
    most = x.clone()
    most[0, 0, 0, 0] = 1e6
    assert torch.equal(layer(x), layer(most))
    sample = torch.randn(2, 3, 8, 8)
    sample[1, 0, 0, 0] = float("nan")
    with torch.inference_mode():
        out = int8.unet(sample, 10).sample
    assert bool(out[0].isfinite().all()) and bool(out[1].isnan().any())


@pytest.fixture(scope="module", params=RUNTIMES)
def fast(int8: DDIMPipeline, request: pytest.FixtureRequest) -> DDIMPipeline:
    return octavo.accelerate(int8, request.param, precision="f32")


@pytest.mark.parametrize("value", [*BAD, 1e30])
def test_the_engine_refuses_inputs_that_are_no_numbers(fast: DDIMPipeline, value: float) -> None:
    """Its integers have no NaN: what came out, of an overflow inside too, would look like an image."""
    sample = torch.zeros(2, 3, 8, 8)
    sample[0, 0, 0, 0] = value
    with pytest.raises(OctavoError, match="sample: holds NaN, infinity or a number beyond 1e"):
        fast.unet(sample, 10)
    assert fast.unet(torch.zeros(2, 3, 8, 8), 10).sample.isfinite().all()


def test_the_largest_inputs_that_the_engine_takes_do_not_overflow(
    int8: DDIMPipeline, fast: DDIMPipeline
) -> None:
    sample = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1) * 1e12
    with torch.inference_mode():
        simulated, executed = (pipeline.unet(sample, 10).sample for pipeline in (int8, fast))
    assert bool(simulated.isfinite().all())
    assert float((executed - simulated).square().mean() / simulated.square().mean()) < 1e-3


def test_the_engine_refuses_no_images_at_all(fast: DDIMPipeline) -> None:
    with pytest.raises(OctavoError, match="sample: has no rows"):
        fast.unet(torch.zeros(0, 3, 8, 8), 10)


def test_no_images_at_all(int8: DDIMPipeline, tmp_path: Path) -> None:
    with torch.inference_mode():
        for _, layer in quantized_layers(int8.unet):
            if hasattr(layer, "in_channels"):
                assert layer(torch.zeros(0, layer.in_channels, 4, 4)).shape[0] == 0
    told = []
    for network in (tiny_pipeline().unet, int8.unet):  # of which the attention has no answer in float either
        with pytest.raises(RuntimeError) as caught:
            network(torch.zeros(0, 3, 8, 8), 10)
        told.append(str(caught.value))
    assert told[0] == told[1]
    with pytest.raises(OctavoError, match="batch_size"):
        octavo.quantize(tiny_pipeline(), RECIPE, batch_size=0, progress=False, workdir=tmp_path)
    observer = HistogramObserver()
    observer.observe(torch.zeros(0, 4))
    with pytest.raises(OctavoError, match="nothing was observed"):
        observer.qparams(QuantSpec())


def test_an_empty_calibration_is_told(tmp_path: Path) -> None:
    with pytest.raises(OctavoError, match="samples: 0"):
        octavo.PTQ4DM(samples=0)
    pipeline = tiny_pipeline()
    seen = observe(pipeline.unet, PairStore(tmp_path, 0), progress=False)
    with pytest.raises(OctavoError, match="never ran during calibration"):
        quantize_observed(pipeline, RECIPE, seen, trace(pipeline))


def test_a_layer_that_is_never_reached_stays_float_or_is_named(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    pipeline.unet.spare = torch.nn.Conv2d(3, 3, 1)
    calibrated = calibrate(pipeline, RECIPE, progress=False, workdir=tmp_path)
    assert "spare" not in calibrated.rules
    assert type(calibrated.pipeline.unet.spare) is torch.nn.Conv2d
    seen = observe(pipeline.unet, PairStore(tmp_path, 0), progress=False)
    traced = trace(pipeline)
    seen.layers.update({name: _observed(torch.randn(8)) for name in traced.executed[:-3]})
    with pytest.raises(
        OctavoError, match=rf"{traced.executed[-3]}: never ran during calibration; exclude it"
    ):
        quantize_observed(pipeline, RECIPE, seen, traced)


def _observed(x: torch.Tensor) -> HistogramObserver:
    observer = HistogramObserver()
    observer.observe(x)
    return observer


@pytest.mark.parametrize("bias", [0.0, 0.7, -300.0])
def test_constant_activations_are_kept_exactly_or_to_half_a_step(tmp_path: Path, bias: float) -> None:
    """A convolution of zeros gives one number everywhere, and the next layer reads nothing else."""
    pipeline = tiny_pipeline()
    with torch.no_grad():
        block = pipeline.unet.mid_block.resnets[0]
        block.norm2.weight.zero_()
        block.norm2.bias.fill_(bias)
    quantized = _quantized(copy.deepcopy(pipeline), tmp_path, octavo.PTQ4DM(samples=4, steps=2))
    layer = dict(quantized_layers(quantized.unet))["mid_block.resnets.0.conv2"]
    seen = torch.nn.functional.silu(torch.tensor(bias))
    x = seen.expand(1, layer.in_channels, 4, 4)
    with torch.no_grad():
        plain = dict(walk(pipeline.unet))["mid_block.resnets.0.conv2"](x)
    assert torch.allclose(layer(x), plain, rtol=0.01, atol=0.01 * float(plain.abs().max()))
    assert bool(quantized.unet(torch.randn(1, 3, 8, 8), 10).sample.isfinite().all())


@pytest.mark.parametrize("size", [12, 4])
def test_image_sizes_that_calibration_did_not_see(int8: DDIMPipeline, size: int) -> None:
    """Ranges are the layers', not the sizes': the same integers, in the simulation and in the engine."""
    fast = octavo.accelerate(int8, precision="f32")
    sample = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))
    with torch.inference_mode():
        simulated, executed = (pipeline.unet(sample, 10).sample for pipeline in (int8, fast))
    assert executed.shape == sample.shape
    assert float((executed - simulated).square().mean() / simulated.square().mean()) < 1e-3

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DPMSolverMultistepScheduler, UNet2DModel

import octavo
from octavo.diffusion import generators
from octavo.errors import OctavoError
from octavo.quantization import QuantLayer, quantized_layers
from octavo.runtimes import convert, executor_of
from octavo.runtimes.audit import AuditRow, require_integers


def noise(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def fast(quantized: DDIMPipeline) -> DDIMPipeline:
    return octavo.accelerate(quantized, precision="f32", batch_size=2)


@pytest.mark.parametrize("rows", [1, 2, 5, 65])
def test_parity_with_the_simulation(digits: DDIMPipeline, fast_digits: DDIMPipeline, rows: int) -> None:
    """On a trained network: at most 5e-3 (relative L2) an evaluation, at any batch size."""
    for timestep in (999, 400, 1):
        x = torch.randn(rows, 1, 16, 16, generator=torch.Generator().manual_seed(timestep))
        with torch.no_grad():
            simulated, executed = digits.unet(x, timestep).sample, fast_digits.unet(x, timestep).sample
        assert relative(executed, simulated) < 5e-3


def test_the_difference_is_single_rounding_flips(fast: DDIMPipeline, quantized: DDIMPipeline) -> None:
    """Where no value sits on a rounding border the engine agrees to float32 precision, which it could not do if a
    scale, a zero point or a padding were handled differently; where one flips, the difference stays below the
    quantization error."""
    differences = []
    with torch.no_grad():
        for timestep in range(1, 1000, 60):
            x = noise(1, seed=timestep)
            differences.append(relative(fast.unet(x, timestep).sample, quantized.unet(x, timestep).sample))
    assert min(differences) < 2e-6
    assert max(differences) < 0.025


def test_the_difference_has_no_systematic_part(fast: DDIMPipeline, quantized: DDIMPipeline) -> None:
    """A bias would not average out: the mean difference is within 4 standard errors of 0."""
    x = noise(64)
    with torch.no_grad():
        difference = (fast.unet(x, 500).sample - quantized.unet(x, 500).sample).double()
    per_image = difference.mean(dim=(1, 2, 3))
    standard_error = per_image.std() / len(per_image) ** 0.5
    assert abs(float(per_image.mean())) < 4 * float(standard_error) + 1e-7


def test_every_quantized_layer_runs_in_int8(fast: DDIMPipeline, quantized: DDIMPipeline) -> None:
    rows = octavo.audit(fast)
    assert [row.layer for row in rows] == [name for name, _ in quantized_layers(quantized.unet)]
    assert all(row.ok and row.precision in ("u8", "i8") for row in rows)


def test_symmetric_activations_run_in_int8_too(pipeline: DDIMPipeline) -> None:
    quantized = octavo.quantize(pipeline, octavo.PTQ4DM(samples=4, steps=2, symmetric=True), progress=False)
    fast = octavo.accelerate(quantized, precision="f32")
    assert all(row.ok for row in octavo.audit(fast))
    with torch.no_grad():
        assert relative(fast.unet(noise(1), 9).sample, quantized.unet(noise(1), 9).sample) < 5e-3


def test_simulation_is_not_called_int8(quantized: DDIMPipeline) -> None:
    rows = octavo.audit(quantized)
    assert rows and not any(row.ok for row in rows)


def test_it_stays_a_drop_in(fast: DDIMPipeline, quantized: DDIMPipeline, tmp_path: Path) -> None:
    assert type(fast) is DDIMPipeline and isinstance(fast.unet, UNet2DModel)
    assert fast.unet.config.sample_size == 8
    assert fast.unet.dtype == torch.float32 and fast.device == torch.device("cpu")
    assert executor_of(quantized) is None, "the original is left as it was"
    output = fast.unet(noise(1), 3, return_dict=False)
    assert isinstance(output, tuple)
    assert torch.equal(fast.unet(noise(1), torch.tensor(3)).sample, output[0])
    images = fast(batch_size=3, num_inference_steps=2, generator=generators(0, 0, 3), output_type="np").images
    assert images.shape == (3, 8, 8, 3)
    fast.save_pretrained(tmp_path / "model")
    assert octavo.load(tmp_path / "model").unet.hf_quantizer.quantization_config.layers


def test_outputs_are_copies(fast: DDIMPipeline) -> None:
    """A multistep sampler keeps earlier outputs: the engine must not write over them."""
    first = fast.unet(noise(1), 3).sample
    kept = first.clone()
    fast.unet(noise(1, seed=9), 500)
    assert torch.equal(first, kept)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
def test_another_scheduler(fast: DDIMPipeline, quantized: DDIMPipeline) -> None:
    images = []
    for pipeline in (fast, quantized):
        unet, scheduler = pipeline.unet, DPMSolverMultistepScheduler()
        scheduler.set_timesteps(5)
        x = noise(2)
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(unet(x, t).sample, t, x, return_dict=False)[0]
        images.append(x)
    assert relative(images[0], images[1]) < 0.05


def test_a_full_precision_pipeline_runs_too(pipeline: DDIMPipeline) -> None:
    fast = octavo.accelerate(pipeline, precision="f32")
    with torch.no_grad():
        assert relative(fast.unet(noise(2), 3).sample, pipeline.unet(noise(2), 3).sample) < 1e-4
    assert octavo.audit(fast) == []


def test_operations_are_part_of_the_graph(make_pipeline) -> None:  # type: ignore[no-untyped-def]
    recipe = octavo.PTQ4DM(samples=4, steps=2, network_output=True, sampled_image=True)
    quantized = octavo.quantize(make_pipeline(), recipe, progress=False)
    fast = octavo.accelerate(quantized, precision="f32")
    with torch.no_grad():
        executed, simulated = fast.unet(noise(2), 3).sample, quantized.unet(noise(2), 3).sample
    scale = float(quantized.unet.octavo_operations["network_output"].scale)
    torch.testing.assert_close(executed / scale, (executed / scale).round(), atol=1e-2, rtol=0)
    assert relative(executed, simulated) < 2e-2


def test_the_second_start_is_from_the_cache(quantized: DDIMPipeline, cache: Path) -> None:
    octavo.accelerate(quantized, precision="f32", batch_size=3)
    graphs = sorted((cache / "openvino").rglob("graph.xml"))
    stamps = [path.stat().st_mtime_ns for path in graphs]
    octavo.accelerate(quantized, precision="f32", batch_size=3)
    assert graphs and stamps == [path.stat().st_mtime_ns for path in graphs]


def test_a_damaged_cache_is_made_again(quantized: DDIMPipeline, cache: Path) -> None:
    octavo.accelerate(quantized, precision="f32")
    for path in (cache / "openvino").rglob("graph.xml"):
        path.write_text("<net")
    fast = octavo.accelerate(quantized, precision="f32")
    assert all(row.ok for row in octavo.audit(fast))


def test_auto_precision_is_remembered(quantized: DDIMPipeline, cache: Path) -> None:
    chosen = []
    for _ in range(2):
        executor = executor_of(octavo.accelerate(quantized, precision="auto", batch_size=2))
        assert executor is not None
        chosen.append([graph.precision for graph in executor.graphs.values()])
    assert chosen[0] == chosen[1] and chosen[0][0] in ("f32", "bf16")


def test_a_float_fallback_is_refused(
    quantized: DDIMPipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A layer whose activations reach the engine unquantized can only run in float: that must not pass unseen."""
    fallen = copy.copy(quantized)
    fallen.unet = copy.deepcopy(quantized.unet)
    fallen.unet.conv_in.bias.data.add_(1.0)  # another network, for the cache
    layer, ordinary = fallen.unet.mid_block.resnets[0].conv1, convert._forward_of

    def float_activations(of: QuantLayer):  # type: ignore[no-untyped-def]
        return (lambda x: of.accumulate(x, of.weight)) if of is layer else ordinary(of)

    monkeypatch.setattr(convert, "_forward_of", float_activations)
    with pytest.raises(OctavoError, match=r"mid_block.resnets.0.conv1 \("):
        octavo.accelerate(fallen)
    warned = octavo.accelerate(fallen, on_fallback="warn")
    assert [row.layer for row in octavo.audit(warned) if not row.ok] == ["mid_block.resnets.0.conv1"]
    assert "fell back" in caplog.text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"runtime": "tensorrt"}, "runtime"),
        ({"precision": "f16"}, "precision"),
        ({"on_fallback": "ok"}, "on_fallback"),
    ],
)
def test_bad_arguments_are_named(quantized: DDIMPipeline, change: dict[str, str], named: str) -> None:
    with pytest.raises(OctavoError, match=named):
        octavo.accelerate(quantized, **change)  # type: ignore[arg-type]


def test_twice_is_once_too_often(fast: DDIMPipeline) -> None:
    with pytest.raises(OctavoError, match="accelerated already"):
        octavo.accelerate(fast)


def test_same_noise_same_bits(fast: DDIMPipeline) -> None:
    runs = [
        fast(batch_size=2, num_inference_steps=3, generator=generators(5, 0, 2), output_type="np").images
        for _ in range(2)
    ]
    assert np.array_equal(*runs)


def test_require_integers_names_the_fallen() -> None:
    require_integers([AuditRow("a", "k", "u8")])
    with pytest.raises(OctavoError, match=r"1 of 2 .* b \(missing\)"):
        require_integers([AuditRow("a", "k", "i8"), AuditRow("b", "none", "missing")])

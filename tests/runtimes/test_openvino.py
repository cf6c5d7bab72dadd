from __future__ import annotations

import copy
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DPMSolverMultistepScheduler, UNet2DModel

import octavo
from octavo.diffusion import generators, probe, sample_shape
from octavo.errors import OctavoError
from octavo.quantization import QuantLayer, quantized_layers
from octavo.runtimes import convert, executor_of, openvino
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


@pytest.mark.parametrize(("bits", "symmetric"), [(6, False), (4, True), (2, False)])
def test_fewer_activation_bits_are_cut_off_8_bit_integers(
    pipeline: DDIMPipeline, bits: int, symmetric: bool
) -> None:
    """They run in integer kernels and saturate where their own range ends, exactly."""
    recipe = octavo.PTQ4DM(activations=bits, symmetric=symmetric, samples=4, steps=2)
    coarse = octavo.quantize(pipeline, recipe, batch_size=4, progress=False)
    executed = octavo.accelerate(coarse, precision="f32", batch_size=1)
    assert all(row.ok for row in octavo.audit(executed))
    differences = []
    with torch.no_grad():
        for timestep in range(1, 1000, 60):
            x = 3 * noise(1, seed=timestep)  # so that layers saturate
            differences.append(relative(executed.unet(x, timestep).sample, coarse.unet(x, timestep).sample))
    assert min(differences) < 2e-6


def test_groups_run_in_the_kernel_that_knows_of_none(pipeline: DDIMPipeline) -> None:
    recipe = octavo.PTQ4DM(weights=4, group_size=16, samples=4, steps=2)
    grouped = octavo.quantize(pipeline, recipe, batch_size=4, progress=False)
    executed = octavo.accelerate(grouped, precision="f32", batch_size=1, threads=1)
    assert all(row.ok and row.precision in ("u8", "i8") for row in octavo.audit(executed))
    differences = []
    with torch.no_grad():
        for timestep in range(1, 1000, 60):
            x = noise(1, seed=timestep)
            differences.append(relative(executed.unet(x, timestep).sample, grouped.unet(x, timestep).sample))
    assert min(differences) < 2e-6, "without a rounding flip they agree"


def test_the_difference_has_no_systematic_part(fast: DDIMPipeline, quantized: DDIMPipeline) -> None:
    """A bias would not average out: no mean over images, of all, of a channel or of a pixel, is far from 0."""
    x = noise(64)
    with torch.no_grad():
        difference = (fast.unet(x, 500).sample - quantized.unet(x, 500).sample).double()
    for per_image, limit in (
        (difference.mean(dim=(1, 2, 3))[:, None], 4.0),
        (difference.mean(dim=(2, 3)), 4.5),
        (difference.flatten(1), 5.5),
    ):
        standard_error = per_image.std(dim=0) / len(per_image) ** 0.5
        z = per_image.mean(dim=0).abs() / (standard_error + 1e-8)
        assert float(z.max()) < limit


def test_every_quantized_layer_runs_in_int8(fast: DDIMPipeline, quantized: DDIMPipeline) -> None:
    rows = octavo.audit(fast)
    assert [row.layer for row in rows] == [name for name, _ in quantized_layers(quantized.unet)]
    assert all(row.ok and row.precision in ("u8", "i8") for row in rows)


def test_symmetric_activations_run_in_int8_too(pipeline: DDIMPipeline) -> None:
    quantized = octavo.quantize(pipeline, octavo.PTQ4DM(samples=4, steps=2, symmetric=True), progress=False)
    fast = octavo.accelerate(quantized, precision="f32")
    assert all(row.ok for row in octavo.audit(fast))
    differences = []
    with torch.no_grad():
        for seed in range(12):
            x = noise(1, seed)
            differences.append(relative(fast.unet(x, 9).sample, quantized.unet(x, 9).sample))
    assert min(differences) < 2e-6, "without a rounding flip they agree"
    assert max(differences) < 0.05


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


def test_its_calls_are_caught_like_any_others(fast: DDIMPipeline, quantized: DDIMPipeline) -> None:
    ours, theirs = (probe(pipeline, num_inference_steps=3) for pipeline in (fast, quantized))
    assert ours == theirs and ours.num_steps == 3
    assert sample_shape(fast) == sample_shape(quantized)


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


def test_precisions_do_not_take_each_others_kernels(pipeline: DDIMPipeline) -> None:
    """OpenVINO's cache loads kernels of one precision for another: images were noise (docs/log.md, 2026-11-22)."""
    pipelines = [octavo.accelerate(pipeline, precision=p, batch_size=2) for p in ("f32", "bf16", "f32")]
    with torch.no_grad():
        exact = pipeline.unet(noise(2), 500).sample
        f32, bf16, again = (fast.unet(noise(2), 500).sample for fast in pipelines)
    assert relative(f32, exact) < 1e-4 and relative(again, exact) < 1e-4
    assert relative(bf16, exact) < 0.1


def test_a_cpu_without_bf16_says_so(
    pipeline: DDIMPipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """OpenVINO takes the hint and computes in f32 without a word."""
    monkeypatch.setattr(openvino, "has_bf16", lambda core: False)
    with caplog.at_level(logging.WARNING):
        fast = octavo.accelerate(pipeline, precision="bf16")
    assert "this CPU has no bf16" in caplog.text
    executor = executor_of(fast)
    assert executor is not None
    assert [graph.precision for graph in executor.graphs.values()] == ["f32"]


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


def test_a_damaged_cache_is_made_again(
    quantized: DDIMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path))
    exact = octavo.accelerate(quantized, precision="f32").unet(noise(1), 500).sample
    (xml,) = (tmp_path / "openvino").rglob("graph.xml")
    for path, contents in (
        (xml, b"<net"),
        (xml.with_suffix(".bin"), b""),
        *_flipped(xml.with_suffix(".bin")),
    ):
        path.write_bytes(contents)
        fast = octavo.accelerate(quantized, precision="f32")
        assert all(row.ok for row in octavo.audit(fast))
        assert torch.equal(fast.unet(noise(1), 500).sample, exact)
    (blob,) = (tmp_path / "openvino").rglob("*.blob")
    blob.chmod(0o600)
    for contents in (b"", blob.read_bytes()[:-100], *(contents for _, contents in _flipped(blob))):
        blob.write_bytes(contents)
        assert torch.equal(octavo.accelerate(quantized, precision="f32").unet(noise(1), 500).sample, exact)
        (blob,) = (tmp_path / "openvino").rglob("*.blob")
        blob.chmod(0o600)


def _flipped(path: Path) -> list[tuple[Path, bytes]]:
    """The file with one bit in a thousand bytes changed: this loads, and computes something else."""
    contents = bytearray(path.read_bytes())
    contents[::1000] = bytes(byte ^ 8 for byte in contents[::1000])
    return [(path, bytes(contents))]


def test_the_kernels_are_kept_and_used_again(
    quantized: DDIMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path))  # the session's may hold these kernels already

    def kernels() -> dict[Path, int]:
        folders = (tmp_path / "openvino").glob("*/kernels-*")
        return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*.blob")}

    octavo.accelerate(quantized, precision="f32", batch_size=7)
    after = kernels()
    assert len(after) == 1
    octavo.accelerate(quantized, precision="f32", batch_size=7)
    assert kernels() == after


def test_threads_reach_the_engine(quantized: DDIMPipeline) -> None:
    executor = executor_of(octavo.accelerate(quantized, precision="f32", threads=1))
    assert executor is not None
    (graph,) = executor.graphs.values()
    assert graph.streams.compiled.get_property("INFERENCE_NUM_THREADS") == 1


def test_auto_precision_is_chosen_once(quantized: DDIMPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["bf16", "f32"])
    monkeypatch.setattr(openvino, "faster_precision", lambda *_: next(answers))
    fast = octavo.accelerate(quantized, precision="auto", batch_size=2)
    fast.unet(noise(1), 3)
    executor = executor_of(fast)
    assert executor is not None
    assert [graph.precision for graph in executor.graphs.values()] == ["bf16", "bf16"]


def test_a_float_fallback_is_refused(
    quantized: DDIMPipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A layer whose activations reach the engine unquantized can only run in float: that must not pass unseen."""
    fallen = copy.copy(quantized)
    fallen.unet = copy.deepcopy(quantized.unet)
    fallen.unet.conv_in.bias.data.add_(1.0)  # another network, for the cache
    layer, ordinary = fallen.unet.mid_block.resnets[0].conv1, convert._forward_of

    def is_layer(of: QuantLayer) -> bool:  # the executor's copies share memory
        return of.weight_int8.data_ptr() == layer.weight_int8.data_ptr()

    def float_activations(of: QuantLayer, *how: bool):  # type: ignore[no-untyped-def]
        return (lambda x: of.accumulate(x, of.weight)) if is_layer(of) else ordinary(of, *how)

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


def test_a_bf16_pipeline_runs_too(saved: Path, quantized: DDIMPipeline) -> None:
    half = octavo.load(saved, dtype=torch.bfloat16)
    fast = octavo.accelerate(half, precision="f32")
    assert half.unet.dtype == fast.unet.dtype == torch.bfloat16
    assert all(row.ok for row in octavo.audit(fast))
    x = noise(1).bfloat16()
    with torch.no_grad():
        executed, simulated = fast.unet(x, 3).sample, quantized.unet(x.float(), 3).sample
    assert executed.dtype == torch.bfloat16
    assert relative(executed.float(), simulated) < 0.05


def test_casting_or_editing_the_new_pipeline_leaves_the_original(pipeline: DDIMPipeline) -> None:
    fast = octavo.accelerate(pipeline, precision="f32")
    before = fast.unet(noise(1), 3).sample
    assert fast.unet.conv_in.bias.data_ptr() == pipeline.unet.conv_in.bias.data_ptr(), "memory is shared"
    layer = pipeline.unet.conv_in
    fast.unet.to(torch.bfloat16)
    fast.unet.conv_in = torch.nn.Identity()
    assert pipeline.unet.conv_in is layer
    assert {parameter.dtype for parameter in pipeline.unet.parameters()} == {torch.float32}
    assert torch.equal(fast.unet(noise(1), 3).sample, before)


def test_weights_changed_behind_the_engine_are_noticed(quantized: DDIMPipeline) -> None:
    changed = copy.copy(quantized)
    changed.unet = copy.deepcopy(quantized.unet)
    fast = octavo.accelerate(changed, precision="f32")
    changed.unet.conv_in.bias.data.add_(1.0)
    fast.unet(noise(1), 3)
    with pytest.raises(OctavoError, match="changed after it was accelerated"):
        fast.unet(noise(2), 3)


def test_a_hook_of_others_is_executed_and_not_cached(pipeline: DDIMPipeline, cache: Path) -> None:
    hooked = copy.copy(pipeline)
    hooked.unet = copy.deepcopy(pipeline.unet)
    results = []
    folders = set((cache / "openvino").glob("*"))
    for factor in (2.0, 3.0):
        hook = hooked.unet.conv_in.register_forward_hook(lambda m, x, y, factor=factor: y * factor)
        fast = octavo.accelerate(hooked, precision="f32")
        with torch.no_grad():
            simulated = hooked.unet(noise(1), 3).sample
        results.append(fast.unet(noise(1), 3).sample)
        assert relative(results[-1], simulated) < 1e-4
        hook.remove()
    assert not torch.equal(*results)
    assert set((cache / "openvino").glob("*")) == folders


def test_a_gradient_and_a_positional_return_dict(fast: DDIMPipeline) -> None:
    x = noise(2).requires_grad_()
    output = fast.unet(x, 3, None, False)
    assert isinstance(output, tuple) and not output[0].requires_grad


def test_openvino_missing_is_said(quantized: DDIMPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(OctavoError, match="pip install openvino"):
        octavo.accelerate(quantized)


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

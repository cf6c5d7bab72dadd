"""What is exported runs without Octavo, as docs/export.md says it does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler

import octavo
from octavo.errors import OctavoError
from octavo.quantization import quantized_layers
from octavo.runtimes import convert
from octavo.runtimes.core import openvino_core
from octavo.runtimes.saturation import adds_in_16_bits

PAGE = (Path(__file__).resolve().parents[2] / "docs/export.md").read_text(encoding="utf-8")
NUMPY_SCRIPT, DIFFUSERS_SCRIPT = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
REFUSED_SCRIPT = """
from diffusers import DDIMScheduler
try:
    DDIMScheduler.from_pretrained("digits-openvino/scheduler")
except OSError:
    sys.exit(0)
sys.exit("loaded without Octavo")
"""
onnx_is_there = pytest.mark.skipif("not __import__('importlib').util.find_spec('onnxruntime')")


def run_without(modules: str, script: str, folder: Path) -> None:
    """The script in a process of its own in which `modules` cannot be imported."""
    hidden = "".join(f"sys.modules[{name!r}] = None\n" for name in modules.split())
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{hidden}{script}"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def simulated_images(pipeline: DDIMPipeline, noise: np.ndarray[Any, Any], steps: int) -> torch.Tensor:
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(noise)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pipeline.unet(x, t).sample, t, x).prev_sample
    return x


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(4 / (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean()))


@pytest.fixture(scope="module")
def place(digits: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page's first script was run, as it stands there."""
    folder = tmp_path_factory.mktemp("page")
    written = octavo.export(digits, folder / "digits-openvino", "openvino")
    assert len(written.audit) == len(list(quantized_layers(digits.unet))) and all(r.ok for r in written.audit)
    assert written.distance < 0.02
    run_without("octavo torch diffusers", NUMPY_SCRIPT, folder)
    return folder


def test_the_page_s_openvino_script_makes_the_simulation_s_images(digits: DDIMPipeline, place: Path) -> None:
    assert len(NUMPY_SCRIPT.splitlines()) <= 25
    images = torch.from_numpy(np.load(place / "images.npy"))
    simulated = simulated_images(digits, np.load(place / "noise.npy"), 20)
    assert images.shape == (4, 1, 16, 16)
    assert psnr(images, simulated) > 35


def test_the_page_s_script_visits_a_trajectory_and_ends_as_the_scheduler_does(
    digits: DDIMPipeline, tmp_path: Path
) -> None:
    """Timesteps by hand, no clipping, the last step to abar_0: what no default has."""
    settings = {"clip_sample": False, "set_alpha_to_one": False}
    scheduler = DDIMScheduler.from_config(digits.scheduler.config, **settings)
    trajectory = octavo.Trajectory((901, 701, 401, 201, 50, 1), 1000, "epsilon", "by hand")
    pipeline = octavo.with_trajectory(DDIMPipeline(digits.unet, scheduler), trajectory)
    folder = tmp_path / "digits-openvino"
    octavo.export(pipeline, folder, "openvino")
    run_without("octavo torch diffusers", NUMPY_SCRIPT, tmp_path)
    images = torch.from_numpy(np.load(tmp_path / "images.npy"))
    x = torch.from_numpy(np.load(tmp_path / "noise.npy"))
    pipeline.scheduler.set_timesteps(6)
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps:
            x = pipeline.scheduler.step(pipeline.unet(x, t).sample, t, x).prev_sample
    assert float((images - x).square().mean() / x.square().mean()) < 1e-3
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"octavo-scheduler"}
    run_without("octavo", REFUSED_SCRIPT, tmp_path)


@onnx_is_there
def test_the_page_s_onnx_script_makes_the_same_images(digits: DDIMPipeline, place: Path) -> None:
    written = octavo.export(digits, place / "digits-ort", "onnx", dialect="onnxruntime")
    assert len(written.audit) == len(list(quantized_layers(digits.unet))) and all(r.ok for r in written.audit)
    run_without("octavo openvino", DIFFUSERS_SCRIPT, place)
    images = torch.from_numpy(np.load(place / "images_ort.npy"))
    assert psnr(images, simulated_images(digits, np.load(place / "noise.npy"), 20)) > 35


def test_the_description_is_enough_to_feed_it(place: Path) -> None:
    about = json.loads((place / "digits-openvino/export.json").read_text())
    assert about["inputs"] == [
        {"name": "sample", "type": "float32", "shape": ["rows", 1, 16, 16]},
        {"name": "timestep", "type": "float32", "shape": ["rows"]},
    ]
    assert about["outputs"] == [{"name": "output", "type": "float32", "shape": ["rows", 1, 16, 16]}]
    assert about["prediction_type"] == "epsilon" and len(about["alphas_cumprod"]) == 1000
    assert about["timesteps"] == list(range(950, -1, -50))
    assert about["previous_timesteps"] == [*range(900, -1, -50), -1]
    assert about["final_alpha_cumprod"] == about["clip_sample_range"] == 1.0
    assert about["component"] == "unet" and about["class"] == "UNet2DModel"
    scheduler = DDIMScheduler.from_pretrained(place / "digits-openvino/scheduler")
    assert torch.allclose(scheduler.alphas_cumprod, torch.tensor(about["alphas_cumprod"]))


def test_the_ir_holds_int8_constants(digits: DDIMPipeline, place: Path) -> None:
    integers = sum(layer.weight_int8.numel() for _, layer in quantized_layers(digits.unet))
    size = (place / "digits-openvino/denoiser.bin").stat().st_size
    assert integers < size < 1.03 * integers


def test_a_file_in_the_folders_place_is_told_before_any_work(digits: DDIMPipeline, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(OctavoError, match="taken: is a file; choose another name"):
        octavo.export(digits, tmp_path / "taken", "openvino")
    assert (tmp_path / "taken").read_text() == "mine"


def test_attention_in_integers_needs_static_shapes(attentive: DDIMPipeline, tmp_path: Path) -> None:
    with pytest.raises(OctavoError, match="give --batch-size"):
        octavo.export(attentive, tmp_path / "free", "openvino")
    assert not (tmp_path / "free").exists()
    written = octavo.export(attentive, tmp_path / "two", "openvino", batch_size=2)
    assert written.distance < 0.05 and all(row.ok for row in written.audit)
    about = json.loads((tmp_path / "two/export.json").read_text())
    assert about["inputs"][0]["shape"] == about["outputs"][0]["shape"] == [2, 3, 8, 8]


@onnx_is_there
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_default_onnx_is_the_simulation_in_either_engine(
    unlimited: DDIMPipeline, default_onnx: Path, engine: str
) -> None:
    """At another timestep and another number of images than it was compared at when it was written."""
    import onnxruntime

    generator = torch.Generator().manual_seed(3)
    sample, timesteps = torch.randn(3, 3, 8, 8, generator=generator), torch.tensor([1.0, 480.0, 930.0])
    inputs = {"sample": sample.numpy(), "timestep": timesteps.numpy()}
    if engine == "onnxruntime":
        session = onnxruntime.InferenceSession(default_onnx, providers=["CPUExecutionProvider"])
        output = session.run(["output"], inputs)[0]
    else:
        settings = json.loads((default_onnx.parent / "export.json").read_text())
        assert settings["dialect"] == "portable"
        compiled = openvino_core().compile_model(default_onnx, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        output = compiled(inputs)["output"]
    with torch.no_grad():
        simulated = unlimited.unet(sample, timesteps).sample
    distance = (torch.from_numpy(output) - simulated).norm() / simulated.norm()
    assert distance < (0.05 if not adds_in_16_bits() else 0.5)


@pytest.fixture(scope="module")
def default_onnx(unlimited: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    written = octavo.export(unlimited, tmp_path_factory.mktemp("default") / "onnx", "onnx")
    assert written.distance < 0.02
    return written.path


@onnx_is_there
def test_portable_onnx_says_what_openvino_cannot_do_with_it(
    attentive: DDIMPipeline, default_onnx: Path, tmp_path: Path
) -> None:
    """What is refused of an IR, or noted of one, is noted of the ONNX file that OpenVINO may read as well."""

    def notes(path: Path) -> str:
        return " ".join(json.loads((path.parent / "export.json").read_text())["notes"])

    assert "8-bit weights: in OpenVINO exact on CPUs with VNNI" in notes(default_onnx)
    assert "attention" not in notes(default_onnx)
    free = octavo.export(attentive, tmp_path / "free", "onnx")
    assert "give --batch-size" in notes(free.path) and "8-bit weights" not in notes(free.path)
    assert "give --batch-size" not in notes(
        octavo.export(attentive, tmp_path / "two", "onnx", batch_size=2).path
    )


def test_what_computes_something_else_is_not_written(
    quantized: DDIMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = convert._forward_of

    def doubled(*of: Any) -> Any:
        forward = original(*of)
        return lambda x: forward(2 * x)

    monkeypatch.setattr(convert, "_forward_of", doubled)
    with pytest.raises(OctavoError, match="from the simulation"):
        octavo.export(quantized, tmp_path / "out", "openvino")
    assert not (tmp_path / "out").exists()


def test_arguments_are_checked(digits: DDIMPipeline, tmp_path: Path) -> None:
    with pytest.raises(OctavoError, match="format: 'gguf' is not one of openvino, onnx"):
        octavo.export(digits, tmp_path / "out", "gguf")  # type: ignore[arg-type]
    with pytest.raises(OctavoError, match="dialect: 'x' is not one of"):
        octavo.export(digits, tmp_path / "out", "onnx", dialect="x")  # type: ignore[arg-type]

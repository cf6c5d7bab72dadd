"""A corrected output in a checkpoint: the same bits again, described in the configuration, checked as the rest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline
from safetensors.torch import load_file, save_file

import octavo
from octavo.calibration import OUTPUT_CORRECTION, attach_operations, output_correction_of
from octavo.checkpoint import float32_bytes
from octavo.checkpoint.config import OctavoConfig
from octavo.checkpoint.contents import check_tensors
from octavo.errors import OctavoError
from octavo.quantization import OutputCorrection

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
RECIPE = octavo.PTQ4DM(
    weights=3, activations=5, samples=16, steps=4, pairs_per_trajectory=2, output_correction=True
)


@pytest.fixture(scope="module")
def corrected(make_pipeline) -> DDIMPipeline:  # type: ignore[no-untyped-def]
    pipeline: DDIMPipeline = octavo.quantize(make_pipeline(seed=3), RECIPE, batch_size=4, progress=False)
    return pipeline


@pytest.fixture(scope="module")
def folder(corrected: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corrected") / "model"
    corrected.save_pretrained(path)
    return path


def output(pipeline: DDIMPipeline) -> torch.Tensor:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return torch.cat([pipeline.unet(x.to(pipeline.unet.dtype), t).sample for t in (1, 333, 999)])


def test_plain_from_pretrained_gives_the_same_bits(corrected: DDIMPipeline, folder: Path) -> None:
    loaded = DDIMPipeline.from_pretrained(folder)
    assert torch.equal(output(loaded), output(corrected))
    for name, tensor in corrected.unet.state_dict().items():
        assert torch.equal(tensor, loaded.unet.state_dict()[name]), name


def test_its_table_stays_float32_in_a_bfloat16_model(folder: Path, corrected: DDIMPipeline) -> None:
    loaded = DDIMPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    correction, original = output_correction_of(loaded.unet), output_correction_of(corrected.unet)
    assert correction is not None and original is not None
    assert all(torch.equal(tensor, original.state_dict()[key]) for key, tensor in correction.named_buffers())
    assert output(loaded).dtype == torch.bfloat16


def test_configuration_and_card_say_so(folder: Path, corrected: DDIMPipeline) -> None:
    correction = output_correction_of(corrected.unet)
    assert correction is not None
    config = json.loads((folder / "unet/config.json").read_text())["quantization_config"]
    assert config["output_correction"] == list(correction.mean.shape)
    assert config["recipe"]["output_correction"] is True
    assert config["calibration"]["output_correction"]["timesteps"] == len(correction.timesteps)
    assert (
        f"| output corrected | at {len(correction.timesteps)} timesteps" in (folder / "README.md").read_text()
    )


def test_the_table_is_no_part_of_the_float_network(make_pipeline, corrected: DDIMPipeline) -> None:  # type: ignore[no-untyped-def]
    parameters = make_pipeline(seed=3).unet.parameters()
    assert float32_bytes(corrected.unet) == sum(4 * parameter.numel() for parameter in parameters)


def test_a_folder_without_one_is_as_it_always_was(saved: Path) -> None:
    config = json.loads((saved / "unet/config.json").read_text())["quantization_config"]
    assert "output_correction" not in config
    assert "output corrected" not in (saved / "README.md").read_text()
    old = {**config, "recipe": {k: v for k, v in config["recipe"].items() if k != "output_correction"}}
    assert OctavoConfig(**old).configuration_digest() == config["digest"]["configuration"]


@pytest.mark.parametrize(
    ("name", "value"), [("k", -1.0), ("mean", float("nan")), ("timesteps", float("inf"))]
)
def test_a_damaged_table_is_told(folder: Path, tmp_path: Path, name: str, value: float) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    tensors = load_file(copy / WEIGHTS)
    tensors[f"octavo_operations.output_correction.{name}"].view(-1)[0] = value
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(OctavoError, match="no table of numbers by ascending timestep"):
        octavo.load(copy)


def test_timesteps_out_of_order_are_told() -> None:
    model, zeros = torch.nn.Linear(1, 1), torch.zeros(2)
    for timesteps in (torch.tensor([5.0, 4.0]), torch.tensor([5.0, 5.0])):
        attach_operations(model, {OUTPUT_CORRECTION: OutputCorrection(timesteps, zeros, zeros.view(2, 1))})
        with pytest.raises(OctavoError, match="output_correction: is no table"):
            check_tensors(model)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (None, "makes no place for it"),
        ([2], "is not a shape"),
        (["2", 3, 1, 1], "is not a shape"),
        ([0, 3, 1, 1], "below 1"),
    ],
)
def test_a_damaged_description_is_told(folder: Path, tmp_path: Path, shape: object, message: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    config = json.loads((copy / "unet/config.json").read_text())
    config["quantization_config"]["output_correction"] = shape
    (copy / "unet/config.json").write_text(json.dumps(config))
    with pytest.raises(OctavoError, match=message):
        octavo.load(copy)

"""Scales by timestep in a checkpoint: the same bits again, described in the configuration, damage told in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline
from safetensors.torch import load_file, save_file

import octavo
from octavo.checkpoint import float32_bytes
from octavo.checkpoint.config import OctavoConfig
from octavo.errors import OctavoError
from octavo.quantization import quantized_layers

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
RECIPE = octavo.PTQ4DM(
    activations=4, samples=40, steps=4, pairs_per_trajectory=4, timesteps="uniform", timestep_groups=2
)


@pytest.fixture(scope="module")
def grouped(make_pipeline) -> DDIMPipeline:  # type: ignore[no-untyped-def]
    pipeline: DDIMPipeline = octavo.quantize(make_pipeline(seed=3), RECIPE, batch_size=20, progress=False)
    return pipeline


@pytest.fixture(scope="module")
def folder(grouped: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grouped") / "model"
    grouped.save_pretrained(path)
    return path


def output(pipeline: DDIMPipeline) -> torch.Tensor:
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = (1, 999, torch.tensor([1, 500, 999]))
    with torch.no_grad():
        return torch.cat([pipeline.unet(x.to(pipeline.unet.dtype), t).sample for t in timesteps])


def test_plain_from_pretrained_gives_the_same_bits(grouped: DDIMPipeline, folder: Path) -> None:
    loaded = DDIMPipeline.from_pretrained(folder)
    assert torch.equal(output(loaded), output(grouped))
    state, again = grouped.unet.state_dict(), loaded.unet.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())
    loaded.save_pretrained(folder.parent / "again")
    assert torch.equal(output(octavo.load(folder.parent / "again")), output(grouped))


def test_tables_stay_float32_in_a_bfloat16_model(folder: Path) -> None:
    loaded = DDIMPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    assert output(loaded).dtype == torch.bfloat16
    tables = [tensor for name, tensor in loaded.unet.state_dict().items() if "timestep_" in name]
    assert len(tables) > 1 and all(tensor.dtype == torch.float32 for tensor in tables)


def test_configuration_and_card_say_so(folder: Path, grouped: DDIMPipeline) -> None:
    layers = sum(layer.timestep_factor is not None for _, layer in quantized_layers(grouped.unet))
    config = json.loads((folder / "unet/config.json").read_text())["quantization_config"]
    assert config["timestep_groups"] == 2 == config["recipe"]["timestep_groups"]
    assert sum(len(kind["names"]) for kind in config["layers"] if kind.get("timestep_groups") == 2) == layers
    assert config["calibration"]["timestep_groups"]["layers"] == layers > 0
    assert f"| scales by timestep | {layers} layers, 2 groups |" in (folder / "README.md").read_text()


def test_tables_are_no_part_of_the_float_network(make_pipeline, grouped: DDIMPipeline) -> None:  # type: ignore[no-untyped-def]
    parameters = make_pipeline(seed=3).unet.parameters()
    assert float32_bytes(grouped.unet) == sum(4 * parameter.numel() for parameter in parameters)


def test_a_folder_without_groups_is_as_it_always_was(saved: Path) -> None:
    config = json.loads((saved / "unet/config.json").read_text())["quantization_config"]
    assert "timestep_groups" not in config
    assert not any("timestep_groups" in kind for kind in config["layers"])
    assert "scales by timestep" not in (saved / "README.md").read_text()
    assert OctavoConfig(**config).configuration_digest() == config["digest"]["configuration"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("timestep_factor", 0.0, "timestep_factor: a scale is not a positive number"),
        ("timestep_groups.borders", float("nan"), "borders: holds NaN or infinity"),
        ("timestep_groups.borders", None, "missing from the checkpoint"),
    ],
)
def test_a_damaged_table_is_told(
    folder: Path, tmp_path: Path, name: str, value: float | None, message: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    tensors = load_file(copy / WEIGHTS)
    key = next(key for key in tensors if key.endswith(name))
    if value is None:
        del tensors[key]
    else:
        tensors[key].view(-1)[0] = value
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(OctavoError, match=message):
        octavo.load(copy)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (None, "timestep_groups None is not a whole number from 1"),
        ("2", "is not a whole number from 1"),
        (3, "has 2 timestep_groups and the model 3"),
        (1, "has 2 timestep_groups and the model 1"),
    ],
)
def test_a_damaged_description_is_told(folder: Path, tmp_path: Path, groups: object, message: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    config = json.loads((copy / "unet/config.json").read_text())
    config["quantization_config"]["timestep_groups"] = groups
    (copy / "unet/config.json").write_text(json.dumps(config))
    with pytest.raises(OctavoError, match=message):
        octavo.load(copy)

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMPipeline, UNet2DModel

import octavo
from octavo.checkpoint.check import check_sizes
from octavo.checkpoint.whose import is_octavos, octavos_components
from octavo.errors import OctavoError


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.mark.parametrize(
    "config",
    [
        {"layers_per_block": 201},
        {"num_layers": [1, 10**9]},
        {"sample_size": 10**6},
        {"block_out_channels": [2**40]},
        {"deep": {"transformer_layers_per_block": [[300]]}},
        {"names": ["x"] * 5000},
        {"norm_eps": 1e300},
    ],
)
def test_numbers_that_no_file_can_fill(config: dict[str, Any]) -> None:
    with pytest.raises(OctavoError, match=r"config\.json: "):
        check_sizes("config.json", config, tensors=200)


def test_the_numbers_of_real_networks_pass() -> None:
    """Of SDXL, FLUX and SD3, as published; `tensors`: fewer than any of them stores."""
    sdxl = {
        "block_out_channels": [320, 640, 1280],
        "transformer_layers_per_block": [1, 2, 10],
        "sample_size": 128,
    }
    sdxl |= {"cross_attention_dim": 2048, "projection_class_embeddings_input_dim": 2816, "norm_eps": 1e-05}
    flux = {
        "axes_dims_rope": [16, 56, 56],
        "joint_attention_dim": 4096,
        "num_layers": 19,
        "num_single_layers": 38,
    }
    amused = {"vocab_size": 8256, "codebook_size": 8192, "num_hidden_layers": 22}
    sd3 = {"caption_projection_dim": 1536, "num_layers": 24, "pos_embed_max_size": 192, "sample_size": 128}
    for config in (sdxl, flux, sd3, amused):
        check_sizes("config.json", config, tensors=400)


def test_octavos_networks_are_known_by_their_tensors_too(
    copy: Path, pipeline: DDIMPipeline, tmp_path: Path
) -> None:
    """Without its `quantization_config` diffusers would give random weights to what it misses, and only warn."""
    path = copy / "unet" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    assert octavos_components(copy) == [copy / "unet"]
    for load, folder in (
        (octavo.load, copy),
        (DDIMPipeline.from_pretrained, copy),
        (UNet2DModel.from_pretrained, copy / "unet"),
    ):
        with pytest.raises(
            OctavoError, match="quantization_config: quant_method is None, but the weights are Octavo's"
        ):
            load(folder)
    pipeline.unet.save_pretrained(tmp_path / "float")
    assert not is_octavos(tmp_path / "float")


def test_what_diffusers_raises_of_octavos_folder_is_one_line(copy: Path) -> None:
    with pytest.raises(OctavoError, match="cannot be loaded: ") as caught:
        UNet2DModel.from_pretrained(copy, subfolder="unet", low_cpu_mem_usage=False)
    assert "\n" not in str(caught.value)


def test_a_float_folder_is_diffusers_own(pipeline: DDIMPipeline, tmp_path: Path) -> None:
    """Links and all: nothing of it is Octavo's business."""
    pipeline.save_pretrained(tmp_path / "float")
    path = tmp_path / "float" / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(tmp_path / "elsewhere.safetensors")
    path.symlink_to(tmp_path / "elsewhere.safetensors")
    DDIMPipeline.from_pretrained(tmp_path / "float")
    octavo.load(tmp_path / "float")

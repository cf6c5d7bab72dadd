from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline
from safetensors.torch import load_file, save_file

import octavo
from octavo.checkpoint import OctavoConfig, float32_bytes
from octavo.errors import OctavoError
from octavo.quantization import quantized_products

CONFIG, WEIGHTS = "unet/config.json", "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(attentive: DDIMPipeline, tmp_path: Path) -> Path:
    attentive.save_pretrained(tmp_path / "attentive")
    return tmp_path / "attentive"


def edit_config(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    config = json.loads((folder / CONFIG).read_text())
    change(config["quantization_config"])
    (folder / CONFIG).write_text(json.dumps(config))


def test_plain_from_pretrained_gives_the_same_bits(folder: Path, attentive: DDIMPipeline) -> None:
    loaded = DDIMPipeline.from_pretrained(folder)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.unet(x, 7).sample, attentive.unet(x, 7).sample)
    assert len(list(quantized_products(loaded.unet))) == 4
    loaded.save_pretrained(folder.with_name("again"))
    assert (folder.with_name("again") / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert (folder.with_name("again") / CONFIG).read_text().count("octavo") == (
        folder / CONFIG
    ).read_text().count("octavo")


def test_the_configuration_describes_it(folder: Path) -> None:
    described = json.loads((folder / CONFIG).read_text())["quantization_config"]
    (group,) = described["attention"]
    assert len(group["names"]) == 2 and "mid_block.attentions.0" in group["names"]
    assert [group[name]["bits"] for name in ("query", "key", "exponentials", "value")] == [8, 7, 7, 8]
    assert described["recipe"]["attention_matmuls"] is True


def test_a_checkpoint_without_it_is_what_it_was(quantized: DDIMPipeline, attentive: DDIMPipeline) -> None:
    """No field that an older Octavo would refuse, and the digest that it would take."""
    config = quantized.unet.hf_quantizer.quantization_config
    values = config.to_dict()
    assert "attention" not in values
    with_it = attentive.unet.hf_quantizer.quantization_config
    without = OctavoConfig(**{key: value for key, value in with_it.to_dict().items() if key != "attention"})
    assert with_it.configuration_digest() != without.configuration_digest()
    assert OctavoConfig(**values).configuration_digest() == config.configuration_digest()
    assert float32_bytes(attentive.unet) == float32_bytes(quantized.unet)


def test_scales_stay_float32_in_another_dtype(folder: Path) -> None:
    loaded = octavo.load(folder, dtype=torch.bfloat16)
    exact = load_file(folder / WEIGHTS)
    for name, product in quantized_products(loaded.unet):
        for side in ("left_scale", "right_scale"):
            assert torch.equal(getattr(product, side), exact[f"{name}.{side}"])


def test_damage_is_told(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = "mid_block.attentions.0.octavo_attention.qk.left_scale"
    save_file({**tensors, name: -tensors[name]}, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(OctavoError, match=r"qk\.left_scale: a scale is not a positive number"):
        octavo.load(folder)
    save_file(
        {key: value for key, value in tensors.items() if key != name},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    with pytest.raises(OctavoError, match=r"qk\.left_scale: missing from the checkpoint"):
        octavo.load(folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda config: config["attention"][0]["names"].append("nowhere"),
            "nowhere: UNet2DModel has no such",
        ),
        (lambda config: config["attention"][0].pop("key"), "attention is not readable"),
        (
            lambda config: config["attention"][0]["value"].update(bits=7),
            "configuration is not what Octavo saved",
        ),
        (lambda config: config.pop("attention"), "makes no place for it"),
    ],
)
def test_another_configuration_is_told(folder: Path, change, told: str) -> None:  # type: ignore[no-untyped-def]
    edit_config(folder, change)
    with pytest.raises(OctavoError, match=told):
        octavo.load(folder)

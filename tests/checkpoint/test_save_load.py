from __future__ import annotations

import copy
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, UNet2DModel
from safetensors.torch import load_file, save_file

import octavo
from octavo.checkpoint import float32_bytes, tensor_bytes
from octavo.checkpoint.config import OctavoConfig
from octavo.diffusion import generators
from octavo.errors import OctavoError
from octavo.quantization import dequantized, quantized_layers

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def image(pipeline):  # type: ignore[no-untyped-def]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        batch_size=2, generator=generators(0, 0, 2), num_inference_steps=3, output_type="np"
    ).images


def test_an_ordinary_folder_with_int8_weights_and_a_card(saved: Path) -> None:
    names = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    assert names == {
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        WEIGHTS,
    }
    tensors = load_file(saved / WEIGHTS)
    assert {t.dtype for name, t in tensors.items() if name.endswith("weight_int8")} == {torch.int8}
    config = json.loads((saved / "unet/config.json").read_text())
    assert config["_class_name"] == "UNet2DModel"
    assert config["quantization_config"]["quant_method"] == "octavo"
    card = (saved / "README.md").read_text()
    assert "octavo.accelerate(pipeline)  #" in card
    assert "import octavo" in card and '"samples": 12' in card and "of float32" in card


def test_plain_from_pretrained_gives_the_same_bits(saved: Path, quantized) -> None:  # type: ignore[no-untyped-def]
    loaded = DDIMPipeline.from_pretrained(saved)
    assert type(loaded.unet) is UNet2DModel
    assert (image(loaded) == image(quantized)).all()


def test_a_new_process_needs_only_import_octavo(saved: Path) -> None:
    code = (
        "import octavo, sys; from diffusers import DDIMPipeline\n"
        f"p = DDIMPipeline.from_pretrained({str(saved)!r})\n"
        "assert 'openvino' not in sys.modules, 'loading must not need the engine'\n"
        "print(len(octavo.audit(p)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 10


def test_saving_twice_gives_the_same_files(quantized, saved: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    quantized.save_pretrained(tmp_path / saved.name)
    for path in (path for path in saved.rglob("*") if path.is_file()):
        assert path.read_bytes() == (tmp_path / saved.name / path.relative_to(saved)).read_bytes(), path


def test_a_loaded_pipeline_saves_again_and_loads_again(saved: Path, tmp_path: Path) -> None:
    first = octavo.load(saved)
    octavo.checkpoint.save_pipeline(first, tmp_path / "again")
    assert load_file(saved / WEIGHTS).keys() == load_file(tmp_path / "again" / WEIGHTS).keys()
    assert (tmp_path / "again" / "README.md").is_file()
    assert (image(octavo.load(tmp_path / "again")) == image(first)).all()


def test_bf16_keeps_scales_and_integers(saved: Path, quantized) -> None:  # type: ignore[no-untyped-def]
    unet = UNet2DModel.from_pretrained(saved / "unet", dtype=torch.bfloat16)
    assert unet.conv_in.weight.dtype == torch.bfloat16
    reference = dict(quantized_layers(quantized.unet))
    for name, layer in quantized_layers(unet):
        assert layer.weight_scale.dtype == layer.input_scale.dtype == torch.float32
        assert torch.equal(layer.weight_scale, reference[name].weight_scale)
        assert torch.equal(layer.input_scale, reference[name].input_scale)
        assert layer.weight_int8.dtype == torch.int8
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact, half = quantized.unet(x, 500).sample, unet(x.bfloat16(), 500).sample
    assert half.dtype == torch.bfloat16
    assert ((half.float() - exact).norm() / exact.norm()) < 0.05


def test_4_bit_weights_are_two_to_a_byte_on_disk(make_pipeline, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    recipe = octavo.PTQ4DM(weights=4, samples=4, steps=2)
    quantized = octavo.quantize(make_pipeline(), recipe, progress=False)
    quantized.save_pretrained(tmp_path / "model")
    stored = load_file(tmp_path / "model" / WEIGHTS)
    layers = dict(quantized_layers(quantized.unet))
    packed = {name for name in stored if name.endswith("weight_int4")}
    assert packed == {f"{name}.weight_int4" for name in layers}
    assert not any(name.endswith("weight_int8") for name in stored)
    for name, layer in layers.items():
        shape = layer.weight_int8.shape
        assert stored[f"{name}.weight_int4"].numel() == shape[0] * ((shape[1:].numel() + 1) // 2)
    loaded = DDIMPipeline.from_pretrained(tmp_path / "model")
    for name, layer in quantized_layers(loaded.unet):
        assert torch.equal(layer.weight_int8, layers[name].weight_int8)
    assert (image(loaded) == image(quantized)).all()
    octavo.accelerate(loaded, batch_size=1)  # audited: the packed weights run in int8


def test_a_packed_tensor_of_another_shape_is_told(make_pipeline, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    recipe = octavo.PTQ4DM(weights=4, samples=2, steps=2)
    octavo.quantize(make_pipeline(), recipe, progress=False).save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / WEIGHTS)
    name = next(name for name in sorted(tensors) if name.endswith("weight_int4"))
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, tmp_path / "model" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(OctavoError, match=r"weight_int4: is .*, not "):
        octavo.load(tmp_path / "model")


@pytest.fixture(scope="module")
def grouped(pipeline):  # type: ignore[no-untyped-def]
    """4-bit weights in groups of 16; two layers have 8 bits, and a scale per channel."""
    recipe = octavo.PTQ4DM(
        weights=4, group_size=16, bits={"mid_block.res*.conv1": (8, 8)}, samples=4, steps=2
    )
    return octavo.quantize(pipeline, recipe, progress=False)


def test_groups_are_4_bits_a_weight_and_a_byte_each(grouped, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    grouped.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    shards = sorted((tmp_path / "model/unet").glob("*.safetensors"))
    assert len(shards) > 2, "multipliers may come before or after their integers"
    stored = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    layers = dict(quantized_layers(grouped.unet))
    wide = {name for name, layer in layers.items() if layer.group_multiplier is None}
    assert wide == {"mid_block.resnets.0.conv1", "mid_block.resnets.1.conv1"}
    for name, layer in layers.items():
        columns = layer.weight_int8[0].numel()
        if name in wide:
            assert f"{name}.weight_int8" in stored and f"{name}.group_multiplier" not in stored
        else:
            assert stored[f"{name}.weight_int4"].shape == (len(layer.weight_int8), (columns + 1) // 2)
            assert stored[f"{name}.group_multiplier"].shape == (len(layer.weight_int8), (columns + 15) // 16)
            assert stored[f"{name}.group_multiplier"].dtype == torch.uint8
            assert 7 < int(layer.weight_int8.abs().max()) <= 63
    loaded = DDIMPipeline.from_pretrained(tmp_path / "model")
    for name, layer in quantized_layers(loaded.unet):
        assert torch.equal(layer.weight_int8, layers[name].weight_int8)
    assert (image(loaded) == image(grouped)).all()
    loaded.save_pretrained(tmp_path / "again")
    assert (image(octavo.load(tmp_path / "again")) == image(grouped)).all()
    assert (
        "in 4 bits per group (wider layers: per output channel)" in (tmp_path / "again/README.md").read_text()
    )
    half = DDIMPipeline.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    for name, layer in quantized_layers(half.unet):
        assert torch.equal(layer.weight_int8, layers[name].weight_int8)
        assert layer.group_multiplier is None or layer.group_multiplier.dtype == torch.uint8


@pytest.mark.parametrize("value", [0, 19, 255])
def test_a_multiplier_that_none_can_be_is_told(grouped, tmp_path: Path, value: int) -> None:  # type: ignore[no-untyped-def]
    grouped.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    shard = min((tmp_path / "model/unet").glob("*.safetensors"))
    tensors = load_file(shard)
    name = next(name for name in sorted(tensors) if name.endswith("group_multiplier"))
    tensors[name][0, -1] = value
    save_file(tensors, shard, metadata={"format": "pt"})
    for load in (octavo.load, DDIMPipeline.from_pretrained):
        with pytest.raises(OctavoError, match=r"group_multiplier: out of range \[1, 18\]; ") as caught:
            load(tmp_path / "model")
        assert "\n" not in str(caught.value)


def test_other_damage_to_groups_is_told(grouped, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    grouped.save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / WEIGHTS)
    multiplier = next(name for name in sorted(tensors) if name.endswith("group_multiplier"))
    packed = multiplier.replace("group_multiplier", "weight_int4")
    one_more = tensors[multiplier] % 9 + 1
    for change, told in (
        ({multiplier: one_more}, "digest"),
        ({multiplier: tensors[multiplier][:, :-1].contiguous()}, "group_multiplier"),
        ({multiplier: None}, "group_multiplier: missing"),
        ({packed: tensors[packed] * 0}, r"weight_int8: out of range \[-7, 7\]"),
    ):
        damaged = {name: value for name, value in {**tensors, **change}.items() if value is not None}
        save_file(damaged, tmp_path / "model" / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(OctavoError, match=told) as caught:
            octavo.load(tmp_path / "model")
        assert "\n" not in str(caught.value)


def test_a_model_of_the_format_before_groups_loads_and_stays_of_it(saved: Path, tmp_path: Path) -> None:
    """Its digest is of the dictionary as it was written then: version 2, and no word of groups."""
    folder = Path(shutil.copytree(saved, tmp_path / "old"))
    path = folder / "unet/config.json"
    config = json.loads(path.read_text())
    fields = config["quantization_config"]
    assert "group_size" not in fields["layers"][0]["weights"]
    fields["format_version"] = 2
    layers = {
        name: {kind: group[kind] for kind in ("weights", "activations", "balanced")}
        for group in fields["layers"]
        for name in group["names"]
    }
    decisive = {"format_version": 2, "layers": layers, "operations": {}}
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    fields["digest"]["configuration"] = digest
    path.write_text(json.dumps(config))
    old = octavo.load(folder)
    old.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again/unet/config.json").read_text())["quantization_config"]
    assert again["format_version"] == 2 and again["digest"]["configuration"] == digest


def test_the_first_format_is_read_where_nothing_is_packed(saved: Path) -> None:
    fields = json.loads((saved / "unet/config.json").read_text())["quantization_config"]
    assert OctavoConfig(**{**fields, "format_version": 1}).format_version == 1
    fields["layers"][0]["weights"].pop("pair_limit", None)  # of 8-bit weights alone
    fields["layers"][0]["weights"]["bits"] = 4
    with pytest.raises(OctavoError, match="did not pack 4-bit weights"):
        OctavoConfig(**{**fields, "format_version": 1})


def test_operations_come_back(make_pipeline, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    recipe = octavo.PTQ4DM(samples=4, steps=2, network_output=True, sampled_image=True)
    quantized = octavo.quantize(make_pipeline(), recipe, progress=False)
    quantized.save_pretrained(tmp_path / "model")
    loaded = DDIMPipeline.from_pretrained(tmp_path / "model")
    assert sorted(loaded.unet.octavo_operations) == ["network_output", "sampled_image"]
    assert (image(loaded) == image(quantized)).all()


def test_sizes_add_up(saved: Path, quantized, pipeline) -> None:  # type: ignore[no-untyped-def]
    assert float32_bytes(quantized.unet) == sum(4 * p.numel() for p in pipeline.unet.parameters())
    header = 8 + int.from_bytes((saved / WEIGHTS).read_bytes()[:8], "little")
    assert (saved / WEIGHTS).stat().st_size == header + tensor_bytes(quantized.unet)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_in_any_type_it_saves_and_loads_again(saved: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    octavo.load(saved, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    again = octavo.load(tmp_path / "half", dtype=dtype)
    assert again.unet.conv_in.weight.dtype == dtype
    assert load_file(tmp_path / "half" / WEIGHTS)["conv_in.weight"].dtype == torch.bfloat16


def test_a_pipeline_in_bf16_is_quantized_saved_and_loaded(make_pipeline, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    half = make_pipeline().to(torch.bfloat16)
    recipe = octavo.PTQ4DM(samples=2, steps=2)
    quantized = octavo.quantize(half, recipe, progress=False)
    quantized.save_pretrained(tmp_path / "model")
    assert len(list(quantized_layers(octavo.load(tmp_path / "model").unet))) > 10


def test_a_changed_float_weight_is_saved_as_it_is(saved: Path, tmp_path: Path) -> None:
    pipeline = octavo.load(saved)
    with torch.no_grad():
        pipeline.unet.conv_in.weight.mul_(2)
    pipeline.save_pretrained(tmp_path / "pipeline")
    pipeline.unet.save_pretrained(tmp_path / "unet")  # the denoiser alone, too
    for unet in (octavo.load(tmp_path / "pipeline").unet, UNet2DModel.from_pretrained(tmp_path / "unet")):
        assert torch.equal(unet.conv_in.weight, pipeline.unet.conv_in.weight)


def test_a_copy_saves_its_own_network(saved: Path, pipeline, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    first, other = octavo.load(saved), octavo.load(saved)
    with torch.no_grad():
        other.unet.conv_in.weight.mul_(2)
    twin = copy.copy(first)
    twin.unet = other.unet
    twin.save_pretrained(tmp_path / "twin")
    assert torch.equal(octavo.load(tmp_path / "twin").unet.conv_in.weight, other.unet.conv_in.weight)
    assert (tmp_path / "twin" / "README.md").is_file()
    twin.unet = pipeline.unet
    twin.save_pretrained(tmp_path / "float")  # diffusers' own saving
    assert not (tmp_path / "float" / "README.md").exists()


def test_a_network_that_is_float_again_is_not_saved_as_a_quantized_one(saved: Path, tmp_path: Path) -> None:
    unet = dequantized(octavo.load(saved).unet)
    with pytest.raises(OctavoError, match="float again"):
        unet.save_pretrained(tmp_path / "unet")
    assert not list(tmp_path.iterdir())


def test_pickles_are_not_written(quantized, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(OctavoError, match="safetensors"):
        quantized.save_pretrained(tmp_path / "model", safe_serialization=False)
    assert not list(tmp_path.iterdir())


def test_shards_are_saved_and_checked_together(quantized, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    quantized.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    assert len(list((tmp_path / "model" / "unet").glob("*.safetensors"))) > 1
    assert (image(octavo.load(tmp_path / "model")) == image(quantized)).all()


def test_the_trained_model_takes_a_quarter(digits, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    digits.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / WEIGHTS).stat().st_size <= 0.27 * float32_bytes(digits.unet)


def test_registering_twice_wraps_once() -> None:
    before = DDIMPipeline.save_pretrained, UNet2DModel.save_pretrained
    octavo.checkpoint.register()
    assert (DDIMPipeline.save_pretrained, UNet2DModel.save_pretrained) == before

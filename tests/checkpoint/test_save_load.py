from __future__ import annotations

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
from octavo.diffusion import generators
from octavo.errors import OctavoError
from octavo.quantization import quantized_layers

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def image(pipeline):  # type: ignore[no-untyped-def]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        batch_size=2, generator=generators(0, 0, 2), num_inference_steps=3, output_type="np"
    ).images


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """The saved folder, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


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
    assert "import octavo" in card and '"samples": 12' in card and "of float32" in card


def test_plain_from_pretrained_gives_the_same_bits(saved: Path, quantized) -> None:  # type: ignore[no-untyped-def]
    loaded = DDIMPipeline.from_pretrained(saved)
    assert type(loaded.unet) is UNet2DModel
    assert (image(loaded) == image(quantized)).all()


def test_a_new_process_needs_only_import_octavo(saved: Path) -> None:
    code = (
        "import octavo, sys; from diffusers import DDIMPipeline\n"
        f"p = DDIMPipeline.from_pretrained({str(saved)!r})\n"
        "print(len(octavo.audit(p)), 'openvino' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    layers, _ = run.stdout.split()
    assert int(layers) > 10


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


def test_saving_leaves_other_peoples_folders_alone(quantized, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(OctavoError, match="mine"):
        quantized.save_pretrained(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_failed_save_leaves_nothing(quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def fails(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(type(quantized.scheduler), "save_pretrained", fails)
    with pytest.raises(OSError, match="No space"):
        quantized.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def _truncate(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-500])


def _edit_tensor(name: str, value: float):  # type: ignore[no-untyped-def]
    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        key = next(key for key in tensors if key.endswith(name))
        tensors[key] = tensors[key].clone()
        tensors[key].view(-1)[0] = value
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return edit


def _drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors.pop(next(key for key in tensors if key.endswith("weight_int8")))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _edit_config(**fields: object):  # type: ignore[no-untyped-def]
    def edit(folder: Path) -> None:
        path = folder / "unet/config.json"
        config = json.loads(path.read_text())
        config["quantization_config"].update(fields)
        path.write_text(json.dumps(config))

    return edit


def _pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "unet/diffusion_pytorch_model.bin")


def _foreign_class(folder: Path) -> None:
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    index["unet"] = ["os", "system"]
    path.write_text(json.dumps(index))


def _other_layers(folder: Path) -> None:
    path = folder / "unet/config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["layers"][0]["names"][0] = "no.such.layer"
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_truncate, "truncated"),
        (_edit_tensor("weight_int8", 3), "digest"),
        (_edit_tensor("weight_scale", float("nan")), "positive"),
        (_edit_tensor("input_scale", -1.0), "positive"),
        (_edit_tensor("input_zero_point", 999), "range"),
        (_edit_tensor("conv_in.weight", 7.0), "digest"),
        (_drop_tensor, "weight_int8"),
        (_edit_config(format_version=99), "upgrade octavo"),
        (_edit_config(format_version="1"), "format_version"),
        (_edit_config(surprise=1), "surprise"),
        (_edit_config(layers=[]), "layers"),
        (_edit_config(layers=[{"names": ["conv_in"]}]), "layers"),
        (_edit_config(quant_method="somebody-elses"), "somebody-elses"),
        (_other_layers, "no.such.layer"),
        (_pickled, "safetensors"),
        (_foreign_class, "os"),
        (lambda folder: (folder / "unet/config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "model_index.json").unlink(), "model_index.json"),
        (lambda folder: shutil.rmtree(folder / "scheduler"), "scheduler"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(copy: Path, damage, told: str) -> None:  # type: ignore[no-untyped-def]
    damage(copy)
    with pytest.raises(OctavoError, match=told) as caught:
        octavo.load(copy)
    assert "\n" not in str(caught.value)


def test_a_folder_that_does_not_exist_is_told() -> None:
    with pytest.raises(OctavoError, match="no/such/model"):
        octavo.load("./no/such/model")

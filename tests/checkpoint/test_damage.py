"""Whatever is wrong with a model is told in one line, and nothing in its folder is run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline
from safetensors.torch import load_file, save_file

import octavo
from octavo.errors import OctavoError

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def with_output(make_pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    """A saved model that has an operation quantized too."""
    folder = tmp_path_factory.mktemp("damage") / "model"
    recipe = octavo.PTQ4DM(samples=2, steps=2, network_output=True)
    octavo.quantize(make_pipeline(), recipe, progress=False).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(with_output: Path, tmp_path: Path) -> Path:
    """The saved folder, to be damaged."""
    return Path(shutil.copytree(with_output, tmp_path / "model"))


def _truncate(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-500])


def _edit_tensor(name: str, value: float):  # type: ignore[no-untyped-def]
    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        key = next(key for key in sorted(tensors) if key.endswith(name))
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


def _add_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "surprise": torch.zeros(1)}, folder / WEIGHTS, metadata={"format": "pt"})


def _half(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["conv_in.weight"] = tensors["conv_in.weight"].half()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _edit_quantization(change):  # type: ignore[no-untyped-def]
    def edit(folder: Path) -> None:
        path = folder / "unet/config.json"
        config = json.loads(path.read_text())
        change(config["quantization_config"])
        path.write_text(json.dumps(config))

    return edit


def _set(place, **fields: object):  # type: ignore[no-untyped-def]
    return _edit_quantization(lambda config: place(config).update(fields))


def _forget_a_layer(folder: Path) -> None:
    _edit_quantization(lambda config: config["layers"][0]["names"].pop())(folder)


def _drop_float(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["conv_in.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


DAMAGED_DENOISER = [
    (_edit_tensor("weight_int8", 3), "digest"),
    (_edit_tensor("weight_int8", -128), "weight_int8: out of range"),
    (_edit_tensor("weight_scale", float("nan")), "positive"),
    (_edit_tensor("weight_scale", 0.5), "digest"),
    (_edit_tensor("input_scale", -1.0), "positive"),
    (_edit_tensor("input_zero_point", 999), "range"),
    (_edit_tensor("network_output.scale", float("inf")), r"network_output\.scale: .*positive"),
    (_edit_tensor("network_output.zero_point", -7), r"network_output\.zero_point: out of range"),
    (_edit_tensor("conv_in.weight", 7.0), "digest"),
    (_half, "digest"),
    (_drop_tensor, "weight_int8"),
    (_drop_float, r"conv_in\.weight: missing"),
    (_add_tensor, "surprise"),
    (_forget_a_layer, r"weight_int8|input_scale|input_zero_point"),
    (_other_layers, "no.such.layer"),
    (_edit_config(format_version=99), "upgrade octavo"),
    (_edit_config(format_version="1"), "format_version"),
    (_edit_config(format_version=True), "format_version"),
    (_edit_config(surprise=1), "surprise"),
    (_edit_config(layers=[]), "layers"),
    (_edit_config(layers=[{"names": ["conv_in"]}]), "layers"),
    (_edit_config(digest={}), "no whole digest"),
    (_edit_config(digest={"tensors": "0"}), "no whole digest"),
    (_edit_config(digest=None), "digest is not a JSON object"),
    (_edit_quantization(lambda config: config.pop("digest")), "no whole digest"),
    (_edit_config(operations={}), "octavo_operations"),
    (_set(lambda config: config["operations"]["network_output"], bits=7), "range|digest"),
    (_set(lambda config: config["layers"][0]["activations"], bits=7), "range|digest"),
    (_set(lambda config: config["layers"][0]["weights"], bits=7), "range|digest"),
]
"""What plain diffusers tells in the same words, because Octavo's quantizer is asked."""

DAMAGED_FOLDER = [
    (_truncate, "truncated"),
    (_edit_config(quant_method="somebody-elses"), "somebody-elses"),
    (_pickled, "safetensors"),
    (_foreign_class, "os"),
    (lambda folder: (folder / "unet/config.json").write_text("{"), "config.json"),
    (lambda folder: (folder / "model_index.json").unlink(), "model_index.json"),
    (lambda folder: shutil.rmtree(folder / "scheduler"), "scheduler"),
]


@pytest.mark.parametrize("load", [octavo.load, DDIMPipeline.from_pretrained], ids=["octavo", "diffusers"])
@pytest.mark.parametrize(("damage", "told"), DAMAGED_DENOISER)
def test_a_damaged_denoiser_is_told_in_one_line(copy: Path, load, damage, told: str) -> None:  # type: ignore[no-untyped-def]
    damage(copy)
    with pytest.raises(OctavoError, match=told) as caught:
        load(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("damage", "told"), DAMAGED_FOLDER)
def test_a_damaged_folder_is_told_in_one_line(copy: Path, damage, told: str) -> None:  # type: ignore[no-untyped-def]
    damage(copy)
    with pytest.raises(OctavoError, match=told) as caught:
        octavo.load(copy)
    assert "\n" not in str(caught.value)


def test_a_changed_weight_is_told_in_every_type(copy: Path) -> None:
    _edit_tensor("conv_in.weight", 7.0)(copy)
    with pytest.raises(OctavoError, match="digest"):
        octavo.load(copy, dtype=torch.bfloat16)


def test_a_folder_that_does_not_exist_is_told() -> None:
    with pytest.raises(OctavoError, match="no/such/model"):
        octavo.load("./no/such/model")


def _index(folder: Path, **fields: object) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"_class_name": ["evil", "Evil"]},
        {"_class_name": "Evil"},
        {"unet": ["evil", "Evil"]},
        {"unet": [None, "Evil"]},
    ],
)
def test_code_beside_the_model_is_never_run(copy: Path, tmp_path: Path, fields: dict[str, object]) -> None:
    sentinel = tmp_path / "ran"
    code = f"open({str(sentinel)!r}, 'w')\nfrom diffusers import DDIMPipeline as Evil\n"
    for name in ("evil.py", "pipeline.py", "unet/evil.py", "unet/unet.py"):
        (copy / name).write_text(code)
    _index(copy, **fields)
    if fields:
        with pytest.raises(OctavoError):
            octavo.load(copy)
    else:
        octavo.load(copy)
    assert not sentinel.exists()

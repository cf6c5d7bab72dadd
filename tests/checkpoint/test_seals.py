from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, StableDiffusionPipeline, UNet2DModel
from safetensors.torch import load_file, save_file
from tiny_families import build

import octavo
from octavo.checkpoint.seals import check_nothing_else, is_pickled
from octavo.errors import OctavoError

LOADERS = (octavo.load, DDIMPipeline.from_pretrained)


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def _edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("scheduler/scheduler_config.json", {"beta_end": 0.021}),
        ("unet/config.json", {"act_fn": "relu"}),
        ("unet/config.json", {"norm_eps": 1e-6}),
        ("model_index.json", {"_class_name": "DDPMPipeline"}),
    ],
)
def test_every_other_file_is_sealed(copy: Path, name: str, fields: dict[str, object]) -> None:
    """Each of these loaded before, to other images than were saved, without a word."""
    _edit(copy / name, **fields)
    for load in LOADERS:
        with pytest.raises(OctavoError, match=rf"{name}: is not what Octavo saved \(digest differs\)"):
            load(copy)


def test_layout_and_additions_are_nobodys_harm(copy: Path) -> None:
    for name in ("scheduler/scheduler_config.json", "unet/config.json", "model_index.json"):
        _edit(copy / name)
    (copy / "README.md").write_text("mine")
    (copy / "notes.txt").write_text("mine too")
    for load in LOADERS:
        load(copy)


def test_a_network_alone_needs_no_pipeline_around_it(copy: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(copy / "unet", tmp_path / "alone"))
    UNet2DModel.from_pretrained(alone).save_pretrained(tmp_path / "again")
    UNet2DModel.from_pretrained(tmp_path / "again")
    _edit(tmp_path / "again" / "config.json", act_fn="relu")
    with pytest.raises(OctavoError, match=r"config\.json: is not what Octavo saved"):
        UNet2DModel.from_pretrained(tmp_path / "again")


def test_another_scheduler_saved_with_the_pipeline_is_sealed_anew(copy: Path, tmp_path: Path) -> None:
    from diffusers import DPMSolverMultistepScheduler

    pipeline = octavo.load(copy)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "other")
    assert "Infinity" in (tmp_path / "other" / "scheduler" / "scheduler_config.json").read_text()
    for load in LOADERS:
        assert load(tmp_path / "other").scheduler.config.lambda_min_clipped == -float(
            "inf"
        )  # DDIM's, says its pipeline


def test_a_folder_from_before_there_were_seals_loads(copy: Path) -> None:
    path = copy / "unet" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["files"], config["quantization_config"]["digest"]["network"]
    path.write_text(json.dumps(config))
    for load in LOADERS:
        load(copy)


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion, saved: text encoder, tokenizer and VAE lie beside the quantized network."""
    pipeline, inputs = build("sd")
    recipe = octavo.PTQ4DM(samples=2, steps=2, metric="minmax", include=("mid_block.*",))
    folder = tmp_path_factory.mktemp("stable") / "model"
    octavo.quantize(pipeline, recipe, batch_size=2, inputs=inputs, progress=False).save_pretrained(folder)
    return folder


def _variant_and_pickle(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    _pickle(path, "pytorch_model.bin")
    path.rename(path.with_name("model.fp16.safetensors"))


def _pickle(path: Path, name: str) -> None:
    torch.save({key: value * 0 for key, value in load_file(path).items()}, path.with_name(name))


def _zeros(path: Path, name: str) -> None:
    tensors = {key: value * 0 for key, value in load_file(path).items()}
    save_file(tensors, path.with_name(name), metadata={"format": "pt"})


VAE = "vae/diffusion_pytorch_model.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"
INDEX = {"metadata": {}, "weight_map": {"a": "notes.md"}}
FOREIGN = {
    "a pickle in another's place": (_variant_and_pickle, {}, "pytorch_model.bin: pickled"),
    "a pickle beside": (
        lambda folder: _pickle(folder / VAE, "diffusion_pytorch_model.fp16.bin"),
        {"variant": "fp16"},
        "fp16.bin: pickled",
    ),
    "a pickle of the network": (
        lambda folder: _pickle(folder / UNET, "diffusion_pytorch_model.bin"),
        {},
        "model.bin: pickled",
    ),
    "a variant": (
        lambda folder: _zeros(folder / VAE, "diffusion_pytorch_model.fp16.safetensors"),
        {"variant": "fp16"},
        "fp16.safetensors: is not among what Octavo saved",
    ),
    "weights renamed": (
        lambda folder: (folder / VAE).rename(folder / "vae/diffusion_pytorch_model.fp16.safetensors"),
        {"variant": "fp16"},
        "diffusion_pytorch_model.safetensors: missing from the checkpoint",
    ),
    "an index": (
        lambda folder: (folder / "text_encoder/model.safetensors.index.json").write_text(json.dumps(INDEX)),
        {},
        "index.json: is not among what Octavo saved",
    ),
    "an adapter": (
        lambda folder: (folder / "text_encoder/adapter_config.json").write_text("{}"),
        {},
        "adapter_config.json: is not among what Octavo saved",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_only_what_was_saved_is_loaded(stable: Path, tmp_path: Path, name: str) -> None:
    """Each file alone is whole and every seal intact; by their names diffusers or transformers would load them."""
    damage, how, told = FOREIGN[name]
    folder = Path(shutil.copytree(stable, tmp_path / "model"))
    damage(folder)
    for load in (octavo.load, lambda path: StableDiffusionPipeline.from_pretrained(path, **how)):
        with pytest.raises(OctavoError, match=told) as caught:
            load(folder)
        assert "\n" not in str(caught.value)


def test_pickles_and_indices_of_them_are_refused_without_seals_too(stable: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stable, tmp_path / "model"))
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["files"]
    path.write_text(json.dumps(config))
    StableDiffusionPipeline.from_pretrained(folder)
    index = folder / "text_encoder/model.safetensors.index.json"
    index.write_text(json.dumps(INDEX))
    with pytest.raises(OctavoError, match=r"index\.json: a: is in 'notes\.md', which is no safetensors file"):
        StableDiffusionPipeline.from_pretrained(folder)
    index.unlink()
    _variant_and_pickle(folder)
    with pytest.raises(OctavoError, match="pickled"):
        StableDiffusionPipeline.from_pretrained(folder)


def test_what_comes_from_the_hub_is_checked_before_it_is_loaded(stable: Path, tmp_path: Path) -> None:
    """By an id that is in the cache."""
    model = tmp_path / "models--a--b"
    snapshot = Path(shutil.copytree(stable, model / "snapshots" / ("0" * 40)))
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0" * 40)
    StableDiffusionPipeline.from_pretrained("a/b", cache_dir=tmp_path, local_files_only=True)
    _variant_and_pickle(snapshot)
    with pytest.raises(OctavoError, match="pickled"):
        StableDiffusionPipeline.from_pretrained("a/b", cache_dir=tmp_path, local_files_only=True)


def test_a_model_saved_as_a_variant_loads_as_one(stable: Path, tmp_path: Path) -> None:
    StableDiffusionPipeline.from_pretrained(stable).save_pretrained(tmp_path / "model", variant="fp16")
    assert (tmp_path / "model/vae/diffusion_pytorch_model.fp16.safetensors").is_file()
    StableDiffusionPipeline.from_pretrained(tmp_path / "model", variant="fp16")


def test_what_is_never_loaded_may_lie_anywhere(stable: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stable, tmp_path / "model"))
    for name in ("vae/README.md", "text_encoder/.DS_Store", "notes.txt"):
        (folder / name).write_text("mine")
    StableDiffusionPipeline.from_pretrained(folder)


def test_of_a_component_that_was_not_downloaded_nothing_is_missing(tmp_path: Path) -> None:
    check_nothing_else(tmp_path, {"vae/diffusion_pytorch_model.safetensors": "0"})


@pytest.mark.parametrize("name", ["a.bin", "a.PT", "b.pth", "c.ckpt", "d.pkl", "a.bin.index.fp16.json"])
def test_pickles_are_known_by_their_names(name: str) -> None:
    assert is_pickled(Path(name))
    assert not is_pickled(Path("model.safetensors.index.fp16.json"))

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from diffusers import DDIMPipeline, UNet2DModel

import octavo
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

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from octavo.cli.inputs import Given, command_with
from octavo.errors import OctavoError


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in (("b.png", 255), ("a.png", 0)):
        Image.new("L", (4, 4), colour).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_prompts_are_the_lines_of_the_file_without_empty_ones(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffa cat\n\n  zwei Hüte \r\n", encoding="utf-8")
    assert Given(prompts=file).inputs() == {"prompt": ["a cat", "zwei Hüte"]}


def test_pictures_come_by_name_and_in_their_mode(pictures: Path) -> None:
    inputs = Given(image=pictures, mask=pictures / "b.png").inputs()
    assert [(one.mode, one.getpixel((0, 0))) for one in inputs["image"]] == [
        ("RGB", (0, 0, 0)),
        ("RGB", (255, 255, 255)),
    ]
    assert [one.mode for one in inputs["mask_image"]] == ["L"]


def test_the_control_image_is_called_what_the_pipeline_calls_it(pictures: Path) -> None:
    from diffusers import StableDiffusionControlNetImg2ImgPipeline, StableDiffusionControlNetPipeline

    for kind, name in (
        (StableDiffusionControlNetPipeline, "image"),
        (StableDiffusionControlNetImg2ImgPipeline, "control_image"),
    ):
        pipeline: Any = object.__new__(kind)
        assert list(Given(control_image=pictures).inputs(pipeline)) == [name]
    with pytest.raises(OctavoError, match="--control-image: this pipeline reads image only"):
        Given(image=pictures, control_image=pictures).inputs(
            object.__new__(StableDiffusionControlNetPipeline)
        )


def test_any_other_argument_is_json_or_text() -> None:
    given = Given(others=["guidance_scale=4.5", "prompt_2=a cat", "sigmas=[1.0, 0.5]", "clean_caption=false"])
    assert given.inputs() == {
        "guidance_scale": 4.5,
        "prompt_2": "a cat",
        "sigmas": [1.0, 0.5],
        "clean_caption": False,
    }


def test_flags_say_the_same_again() -> None:
    given = Given("a cat", None, "3,5", Path("in"), Path("mask.png"), Path("control"), ["eta=1"])
    assert command_with(given, "sample", "m") == (
        "octavo sample m --prompt 'a cat' --class-labels 3,5 --image in --mask mask.png --control-image control "
        "--input eta=1"
    )


def test_what_was_given_is_recorded_as_json(pictures: Path) -> None:
    given = Given(class_labels="3,5", image=pictures, others=["eta=1"])
    assert json.loads(json.dumps(given.recorded())) == {
        "class_labels": [3, 5],
        "eta": 1,
        "image": str(pictures),
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": "a", "prompts": "empty.txt"}, "--prompts: --prompt is given too"),
        ({"prompts": "empty.txt"}, "--prompts: .*empty.txt holds no line"),
        ({"prompts": "absent.txt"}, "--prompts: .*absent.txt cannot be read as text"),
        ({"image": "absent.png"}, "--image: .*absent.png cannot be read as a picture"),
        ({"mask": "empty.txt"}, "--mask: .*empty.txt cannot be read as a picture"),
        ({"image": "."}, "--image: .* holds no picture"),
        ({"others": ["eta"]}, "--input: 'eta' is not of the form name=value"),
        ({"prompt": "a", "others": ["prompt=b"]}, "--input: prompt is given twice"),
    ],
)
def test_what_cannot_be_read_is_told(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    files = {
        key: tmp_path / value if key in ("prompts", "image", "mask") else value
        for key, value in given.items()
    }
    with pytest.raises(OctavoError, match=message):
        Given(**files).inputs()

"""`octavo quantize` and `octavo sample` with the user's own prompts and pictures, on an inpainting pipeline."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image
from tiny_families import PICTURES, PROMPTS, build, picture


@pytest.fixture(scope="module")
def material(tmp_path_factory: Any) -> Path:
    """A full-precision model, a folder of pictures, a mask, a file of prompts."""
    folder: Path = tmp_path_factory.mktemp("inpaint")
    build("inpaint")[0].save_pretrained(folder / "model")
    (folder / "pictures").mkdir()
    for k, one in enumerate(PICTURES):
        one.save(folder / "pictures" / f"{k}.png")
    picture(0, "L").save(folder / "mask.png")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


def _pixels(image: Image.Image) -> tuple[tuple[int, int], bytes]:
    return image.size, image.tobytes()


def test_quantize_and_sample_with_prompts_and_pictures(
    material: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[Any]] = []
    call = StableDiffusionInpaintPipeline.__call__

    @functools.wraps(call)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        pictures = (map(_pixels, kwargs[name]) for name in ("image", "mask_image"))
        calls.append(list(zip(kwargs["prompt"], *pictures, strict=True)))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(StableDiffusionInpaintPipeline, "__call__", watched)
    own = [
        (word, _pixels(one), _pixels(picture(0, "L"))) for word, one in zip(PROMPTS, PICTURES, strict=True)
    ]
    given = ["--prompts", material / "prompts.txt", "--image", material / "pictures"]
    given += ["--mask", material / "mask.png", "--input", "height=16", "--input", "width=16"]
    calibration = ["--recipe", "ptq4dm", "--samples", 3, "--steps", 3, "--batch-size", 3]
    calibration += ["--pairs-per-trajectory", 1]
    code, out, err = run(
        capsys, "quantize", material / "model", "--out", material / "int8", *calibration, *given
    )
    assert code == 0, err
    assert "--prompts" in out and "--mask" in out and "--input height=16" in out, "the next command has them"
    assert set(own) == {row for rows in calls for row in rows}, "each image its own, while calibrating"
    calls.clear()
    assert "| calibrated for | inpainting |" in (material / "int8" / "README.md").read_text()
    images = material / "images.npz"
    drawing = ["--num-images", 3, "--steps", 3, "--runtime", "torch", "--seed", 1]
    code, out, err = run(capsys, "sample", material / "int8", "--out", images, *drawing, *given)
    assert code == 0, err
    with np.load(images) as file:
        assert file["arr_0"].shape == (3, 16, 16, 3)
    assert own in calls


def test_what_is_missing_is_told_by_its_option(material: Path, capsys: Any) -> None:
    Image.new("RGB", (16, 16)).save(material / "one.png")
    code, _, err = run(
        capsys,
        "quantize",
        material / "model",
        "--out",
        material / "other",
        "--prompt",
        "a cat",
        "--image",
        material / "one.png",
    )
    assert code == 2 and "StableDiffusionInpaintPipeline needs mask_image (--mask)" in err

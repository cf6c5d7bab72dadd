"""Images put where people can see them: a grid, a folder, an array, a comparison."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from octavo.errors import OctavoError
from octavo.files import atomic_path
from octavo.places import check_place

Uint8Images = NDArray[np.uint8]
SHOWN_SIZE = 64
GAP = 2
NUMBERED = re.compile(r"\d{5,}\.png")
MARK = "Software"
"""PNG's word for what wrote a picture: only folders of pictures that name Octavo there are replaced."""


def grid(images: Uint8Images, columns: int | None = None) -> Image.Image:
    """uint8 [N, H, W, 1 or 3] as one picture, row by row; small images are shown larger, pixel for pixel."""
    count, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    zoom = max(1, SHOWN_SIZE // max(height, width))
    cell_h, cell_w = height * zoom + GAP, width * zoom + GAP
    sheet = Image.new("RGB", (columns * cell_w + GAP, math.ceil(count / columns) * cell_h + GAP), "#404040")
    for k, image in enumerate(images):
        shown = to_picture(image).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
        sheet.paste(shown, (GAP + k % columns * cell_w, GAP + k // columns * cell_h))
    return sheet


def side_by_side(left: Image.Image, left_title: str, right: Image.Image, right_title: str) -> Image.Image:
    """Two pictures with a title above each."""
    title, gap = 22, 12
    sheet = Image.new(
        "RGB", (left.width + gap + right.width, title + max(left.height, right.height)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for picture, text, x in ((left, left_title, 0), (right, right_title, left.width + gap)):
        draw.text((x + 4, 5), text, fill="black")
        sheet.paste(picture, (x, title))
    return sheet


def to_picture(image: Uint8Images) -> Image.Image:
    """uint8 [H, W, 1 or 3] as an RGB picture."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")


def save_images(images: Uint8Images, out: Path) -> str:
    """Write uint8 [N, H, W, C] by the form of `out`; returns what was written, for people.

    `.png` one grid; `.npz` the guided-diffusion convention (`arr_0`, uint8, NHWC); no suffix a folder of numbered
    PNGs, `00000.png` for the first image. Nothing half-written stays behind. Raises as `check_images_place` does.
    """
    check_images_place(out)
    if out.suffix == ".png":
        save_picture(grid(images), out)
        return f"{out}: grid of {len(images)} images"
    if out.suffix == ".npz":
        with atomic_path(out) as temporary:
            np.savez(temporary, arr_0=images)
        return f"{out}: arr_0 {images.shape} uint8"
    with atomic_path(out) as temporary:
        temporary.mkdir()
        mark = PngInfo()
        mark.add_text(MARK, "Octavo")
        for k, image in enumerate(images):
            to_picture(image).save(temporary / f"{k:05d}.png", pnginfo=mark)
    return f"{out}: {len(images)} PNGs"


def check_images_place(out: Path) -> None:
    """Raise `OctavoError` if `save_images` cannot write `out`, or would remove what it did not write itself."""
    check_place(out)
    if out.suffix not in (".png", ".npz", ""):
        raise OctavoError(
            f"{out}: ends neither in .png (a grid) nor .npz (an array), nor is it a folder's name"
        )
    if out.suffix and out.is_dir():
        raise OctavoError(f"{out}: is a folder; choose another name")
    if not out.suffix and out.exists():
        if not out.is_dir():
            raise OctavoError(f"{out}: is a file; choose another name, ending in .png or .npz, or a folder's")
        if foreign := next((path.name for path in sorted(out.iterdir()) if not _is_own(path)), None):
            raise OctavoError(f"{out}: holds {foreign}, which Octavo did not write; choose another folder")


def _is_own(path: Path) -> bool:
    """Whether `save_images` wrote a picture of a folder; many data sets are numbered like its own."""
    if path.is_symlink() or not path.is_file() or not NUMBERED.fullmatch(path.name):
        return False
    try:
        with Image.open(path) as picture:
            return picture.info.get(MARK) == "Octavo"
    except OSError:
        return False


def save_picture(picture: Image.Image, path: Path) -> None:
    with atomic_path(path) as temporary:
        picture.save(temporary)

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from octavo.errors import OctavoError
from octavo.report import check_images_place, grid, save_images, side_by_side


def images(count: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, channels), dtype=np.uint8)


def test_image_k_is_in_row_k_div_columns() -> None:
    batch = images(5, 3)
    sheet = np.asarray(grid(batch, columns=3))
    zoom, gap = 8, 2
    for k in range(5):
        top, left = gap + k // 3 * (64 + gap), gap + k % 3 * (64 + gap)
        cell = sheet[top : top + 64, left : left + 64]
        assert np.array_equal(cell[::zoom, ::zoom], batch[k])


def test_side_by_side_is_as_wide_as_both() -> None:
    left, right = grid(images(4)), grid(images(9))
    assert side_by_side(left, "a", right, "b").width > left.width + right.width


@pytest.mark.parametrize("name", ["a.npz", "a.png", "folder"])
def test_writing_twice_replaces_and_leaves_nothing_else(tmp_path: Path, name: str) -> None:
    for _ in range(2):
        save_images(images(3), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    if name == "folder":
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == [
            "00000.png",
            "00001.png",
            "00002.png",
        ]
        assert np.array_equal(
            np.asarray(Image.open(tmp_path / name / "00001.png"))[..., 0], images(3)[1, ..., 0]
        )


def test_other_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OctavoError, match=r"a\.jpg"):
        save_images(images(1), tmp_path / "a.jpg")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(OctavoError, match="mine"):
        save_images(images(1), tmp_path / "mine")


@pytest.mark.parametrize("name", ["mum.png", "0001.png", "00000.png/inner.png"])
def test_other_pictures_are_never_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / "photos" / name).parent.mkdir(parents=True)
    (tmp_path / "photos" / name).write_text("mum")
    with pytest.raises(OctavoError, match="photos"):
        save_images(images(1), tmp_path / "photos")
    assert (tmp_path / "photos" / name).read_text() == "mum"


@pytest.mark.parametrize("place", ["file", "folder.png", "file/a.png", "."])
def test_places_that_cannot_be_are_told_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OctavoError):
        check_images_place(Path(place))


def test_pictures_that_are_numbered_like_ours_are_not_ours(tmp_path: Path) -> None:
    """Many data sets are (FFHQ)."""
    folder = tmp_path / "ffhq"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "00000.png")
    with pytest.raises(OctavoError, match=r"ffhq: holds 00000\.png, which Octavo did not write"):
        save_images(images(1), folder)
    (folder / "00000.png").unlink()
    save_images(images(3), folder)
    save_images(images(2), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["00000.png", "00001.png"]

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from octavo.errors import OctavoError
from octavo.evaluation.images import read_images, to_network
from octavo.report.grid import save_images


@pytest.fixture
def colours() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (12, 6, 5, 3), dtype=np.uint8)


def test_npz_and_folder_as_octavo_writes_them(colours, tmp_path: Path) -> None:
    save_images(colours, tmp_path / "images.npz")
    save_images(colours, tmp_path / "images")
    for path in (tmp_path / "images.npz", tmp_path / "images"):
        images = read_images(path)
        assert images.dtype == np.uint8 and np.array_equal(images, colours)


def test_grey_arrays_gain_a_channel(colours, tmp_path: Path) -> None:
    np.savez(tmp_path / "grey.npz", colours[..., 0])
    assert np.array_equal(read_images(tmp_path / "grey.npz"), colours[..., :1])


def test_names_are_in_natural_order_and_grey_joins_colour(colours, tmp_path: Path) -> None:
    for k, image in enumerate(colours):
        picture = Image.fromarray(image[..., 0]) if k == 2 else Image.fromarray(image)
        picture.save(tmp_path / f"a²{k + 8}.PNG")  # 8, 9, 10, ...
    (tmp_path / "notes.txt").write_text("no image")
    images = read_images(tmp_path)
    expected = colours.copy()
    expected[2] = colours[2, ..., :1]
    assert np.array_equal(images, expected)


def test_all_grey_stays_grey_and_jpeg_is_near(tmp_path: Path) -> None:
    grey = np.full((16, 16), 77, dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.jpg")
    Image.fromarray(grey).save(tmp_path / "b.png")
    images = read_images(tmp_path)
    assert images.shape == (2, 16, 16, 1)
    assert np.abs(images[0].astype(int) - 77).max() <= 1 and (images[1] == 77).all()


class Trap:
    """What a pickle would run."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("sprung",)


def test_nothing_in_an_array_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "trap.npz", np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(OctavoError, match=r"trap\.npz"):
        read_images(tmp_path / "trap.npz")
    assert not (tmp_path / "sprung").exists()


def damaged(folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    (folder / "empty").mkdir()
    np.savez(folder / "name.npz", images=whole)
    np.savez(folder / "float.npz", whole / 255)
    np.savez(folder / "none.npz", whole[:0])
    np.savez(folder / "layout.npz", whole.transpose(0, 3, 1, 2))
    np.save(folder / "plain.npy", whole)
    (folder / "text.npz").write_text("no array")
    (folder / "nothing.npz").write_bytes(b"")
    buffer = io.BytesIO()
    np.savez(buffer, whole)
    (folder / "cut.npz").write_bytes(buffer.getvalue()[:400])
    with zipfile.ZipFile(buffer) as whole_file, zipfile.ZipFile(folder / "short.npz", "w") as archive:
        archive.writestr("arr_0.npy", whole_file.read("arr_0.npy")[:300])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, whole)
    flipped = bytearray(buffer.getvalue())
    flipped[100:140] = bytes(40)
    (folder / "flipped.npz").write_bytes(flipped)
    for name in ("sizes", "broken", "alpha", "deep"):
        (folder / name).mkdir()
        Image.fromarray(whole[0]).save(folder / name / "0.png")
    Image.fromarray(whole[0, :4]).save(folder / "sizes" / "1.png")
    (folder / "broken" / "1.png").write_bytes((folder / "broken" / "0.png").read_bytes()[:60])
    Image.fromarray(np.dstack([whole[0], whole[0, ..., 0]])).save(folder / "alpha" / "1.png")
    Image.fromarray(whole[0, ..., 0].astype(np.uint16) * 200).save(folder / "deep" / "1.png")
    return [path for path in folder.iterdir()] + [folder / "absent.npz"]


def test_each_damage_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    paths = damaged(tmp_path)
    assert len(paths) == 16
    for path in paths:
        with pytest.raises(OctavoError) as caught:
            read_images(path)
        assert path.name in str(caught.value) and "\n" not in str(caught.value)


def test_to_network_averages_areas_and_weighs_colours(colours) -> None:
    large = np.repeat(np.repeat(colours, 4, axis=1), 4, axis=2)
    tensor = to_network(large, 3, 6, 5)
    np.testing.assert_allclose(tensor.numpy(), colours.transpose(0, 3, 1, 2) / 255, atol=1e-6)
    with Image.fromarray(colours[0]).convert("L") as picture:
        expected = np.asarray(picture) / 255
    np.testing.assert_allclose(to_network(colours[:1], 1, 6, 5)[0, 0].numpy(), expected, atol=1 / 255)
    assert torch.equal(
        to_network(colours[..., :1], 3, 6, 5)[:, 2], to_network(colours[..., :1], 1, 6, 5)[:, 0]
    )

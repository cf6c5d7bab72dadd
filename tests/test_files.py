from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from octavo.errors import OctavoError
from octavo.files import atomic_path, cache_folder, read_json, write_json


def test_json_round_trip_keeps_order_and_unicode(tmp_path: Path) -> None:
    path = tmp_path / "new" / "figures.json"
    figures = {"z": 1, "a": [1.5, None, "é"]}
    write_json(path, figures)
    assert read_json(path) == figures
    assert list(read_json(path)) == ["z", "a"]
    assert "é" in path.read_text(encoding="utf-8")


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    write_json(path, 1)
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert read_json(path) == 1
    assert os.listdir(tmp_path) == ["figures.json"]


@pytest.mark.parametrize("value", [float("nan"), {1j: 2}, object()])
def test_what_json_cannot_hold_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(OctavoError, match="cannot be written as JSON"):
        write_json(tmp_path / "figures.json", value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", '{"a": ', "[" * 100_000, "\ud800"])
def test_what_is_not_json_gives_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "figures.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(OctavoError, match=r"figures\.json: is not JSON") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_absent_file_gives_one_line(tmp_path: Path) -> None:
    with pytest.raises(OctavoError, match="cannot be read"):
        read_json(tmp_path / "absent.json")


def test_folder_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with atomic_path(tmp_path / "model") as temporary:
            temporary.mkdir()
            (temporary / name).touch()
    assert os.listdir(tmp_path / "model") == ["second"]
    assert os.listdir(tmp_path) == ["model"]


def test_file_has_the_ordinary_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    write_json(tmp_path / "atomic", 1)
    assert stat.S_IMODE((tmp_path / "atomic").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("OCTAVO_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "octavo"

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from octavo.errors import OctavoError
from octavo.files import _exchange, atomic_path, cache_folder, put, read_json, write_json
from octavo.places import check_file_place, check_place
from octavo.writers import UNFINISHED, remove_unfinished


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


def test_what_a_killed_writer_left_goes_once_it_is_old(tmp_path: Path) -> None:
    killed = atomic_path(tmp_path / "figures.json")
    killed.__enter__().write_text("half")
    mine = tmp_path / ".mine"
    mine.mkdir()
    os.utime(mine, (0, 0))
    (left,) = tmp_path.glob(".figures.json.*")
    remove_unfinished(tmp_path)
    assert left.is_dir()  # perhaps its writer lives
    os.utime(left, (0, 0))
    remove_unfinished(tmp_path)
    remove_unfinished(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == [mine]


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


def test_the_next_writer_removes_what_a_killed_one_left_and_nothing_of_a_living_ones(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    killed = tmp_path / f".{path.name}.abcdefgh{UNFINISHED}"
    anothers = tmp_path / f".{path.name}.other.abcdefgh{UNFINISHED}"
    killed.mkdir()
    anothers.mkdir()
    with atomic_path(path) as mine:
        assert not killed.exists()
        write_json(path, 1)
        mine.write_text("2")
    assert path.read_text() == "2"
    assert sorted(os.listdir(tmp_path)) == [anothers.name, path.name]


def test_a_folder_is_never_absent_while_another_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system can exchange two; else it is moved aside first."""
    if not _exchange(*_two(tmp_path / "try")):
        pytest.skip("this system cannot exchange two folders")
    old, new = _two(tmp_path / "for-real")

    def never(*paths: object) -> None:
        raise AssertionError(f"{paths} were moved one after the other")

    monkeypatch.setattr(os, "replace", never)
    put(new, old)
    assert os.listdir(old) == ["new"] and os.listdir(new) == ["old"]


def _two(folder: Path) -> tuple[Path, Path]:
    for name in ("old", "new"):
        (folder / name / name).mkdir(parents=True)
    return folder / "old", folder / "new"


@pytest.mark.parametrize("name", ["model", "replaced"])
def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "old").touch()
    replace, calls = os.replace, []

    def fails_second(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("Stale file handle")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_second)
    monkeypatch.setattr("octavo.files._exchange", lambda one, other: False)
    with pytest.raises(OSError, match="Stale"), atomic_path(tmp_path / name) as temporary:
        temporary.mkdir()
    assert len(calls) == 3
    assert os.listdir(tmp_path) == [name] and os.listdir(tmp_path / name) == ["old"]


@pytest.mark.parametrize("place", [".", "..", "/"])
def test_a_place_without_a_name_is_refused(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OctavoError, match="name a file or folder"):
        check_place(place)
    with pytest.raises(OctavoError, match="name a file or folder"), atomic_path(place):
        pass


def test_a_place_under_a_file_is_refused_and_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OctavoError, match="not a folder"):
        check_place(tmp_path / "file" / "a" / "b")
    check_place(tmp_path / "new" / "b")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc, which even root may not write to")
def test_a_place_that_only_seems_writable_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OctavoError, match="/proc/x: /proc may not be written to"):
        check_place("/proc/x")
    check_place(tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OctavoError, match="is a folder; name a file"):
        check_file_place(tmp_path)
    check_file_place(tmp_path / "new.json")


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


def test_a_block_may_write_atomically_within_its_own_temporary(tmp_path: Path) -> None:
    """Within a folder that is being made, also at the very path that was handed out."""

    def write() -> None:
        with atomic_path(tmp_path / "whole") as outer:
            with atomic_path(outer) as inner:
                inner.mkdir()
                (inner / "a.txt").write_text("a")
            with atomic_path(outer / "b.txt") as inner:
                inner.write_text("b")

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it waits for a lock that it holds itself"
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == ["a.txt", "b.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_all_that_openvino_says_of_a_full_disk_is_told_in_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(
            OctavoError, match=r"model: cannot be written \(no space left, or a place that takes no"
        ),
        atomic_path(tmp_path / "model"),
    ):
        raise RuntimeError("basic_ios::clear: iostream error")
    with pytest.raises(RuntimeError, match="other"), atomic_path(tmp_path / "model"):
        raise RuntimeError("other")

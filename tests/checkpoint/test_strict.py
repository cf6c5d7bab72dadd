from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMPipeline, UNet2DModel

import octavo
from octavo.checkpoint.strict import check_contents, check_name, read_strict
from octavo.errors import OctavoError

BAD = {
    '{"a": {"b": 1, "b": 1}}': "has the key 'b' twice",
    '{"a": NaN}': "holds NaN",
    '{"a": 1e999}': "holds 1e999",
    '{"a": -Infinity}': "holds -Infinity",
    "[" * 40 + "]" * 40: "is nested more than 32 levels",
    "[" * 10**6: "is nested more than 32 levels",
    '{"a": ' + "9" * 5000 + "}": "is not JSON",
    '{"a": 1': "is not JSON",
    "": "is not JSON",
}


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_what_is_no_strict_json_is_told_with_its_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(OctavoError, match=f"config.json: ({BAD[text]})"):
        read_strict(path)


def test_schedulers_may_have_infinities(tmp_path: Path) -> None:
    """As diffusers' DPMSolverMultistepScheduler saves them; NaN they may not."""
    path = tmp_path / "scheduler_config.json"
    path.write_text('{"lambda_min_clipped": -Infinity}')
    assert read_strict(path, infinities=True) == {"lambda_min_clipped": -float("inf")}
    path.write_text('{"lambda_min_clipped": NaN}')
    with pytest.raises(OctavoError, match="NaN"):
        read_strict(path, infinities=True)


def test_a_file_that_is_no_text_or_too_long_is_told(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(OctavoError, match="not UTF-8"):
        read_strict(path)
    with path.open("wb") as file:
        file.truncate(1 << 40)  # of holes
    with pytest.raises(OctavoError, match="no configuration"):
        read_strict(path)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd", "..\\a", "c:a", "a\0b", "x" * 256])
def test_paths_are_no_names(name: str) -> None:
    with pytest.raises(OctavoError, match="is a path, not a name"):
        check_name(name, "model_index.json")


def test_what_leads_out_of_the_folder_is_refused(saved: Path, tmp_path: Path) -> None:
    """Links to files that would load, each alone, by Octavo and by plain diffusers; none of them is opened before."""
    for name in (
        "unet",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "scheduler",
        "model_index.json",
    ):
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(saved, folder)
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
        (folder / name).symlink_to(saved / name)
        for load in (octavo.load, DDIMPipeline.from_pretrained):
            with opened() as paths, pytest.raises(OctavoError, match="leads out of the folder"):
                load(folder)
            assert not [path for path in paths if path.startswith(str(saved.resolve()))]
        if name.startswith("unet/"):
            with opened() as paths, pytest.raises(OctavoError, match="leads out of the folder"):
                UNet2DModel.from_pretrained(folder / "unet")
            assert not [path for path in paths if path.startswith(str(saved.resolve()))]


def test_what_is_opened_is_seen_through_links(saved: Path, tmp_path: Path) -> None:
    """Else the test before would prove nothing."""
    (tmp_path / "link").symlink_to(saved)
    with opened() as paths:
        read_strict(tmp_path / "link" / "model_index.json")
    assert paths == [str(saved.resolve() / "model_index.json")]


WATCHERS: list[list[str]] = []


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if WATCHERS and event == "open" and isinstance(args[0], (str, os.PathLike)):
        WATCHERS[-1].append(os.path.realpath(args[0]))


@contextmanager
def opened() -> Iterator[list[str]]:
    """The files that the block opens, links followed."""
    if not hasattr(_watch, "added"):  # an audit hook stays for ever
        sys.addaudithook(_watch)
        _watch.added = True  # type: ignore[attr-defined]
    WATCHERS.append([])
    try:
        yield WATCHERS[-1]
    finally:
        WATCHERS.pop()


def test_pipes_and_circles_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OctavoError, match="neither a file nor a folder"):
        check_contents(tmp_path)
    (tmp_path / "pipe").unlink()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(OctavoError, match="circle"):
        check_contents(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no named pipes")
@pytest.mark.parametrize(
    "name", ["scheduler/x.safetensors", "unet/x.safetensors", "unet/config.json", "x.json"]
)
def test_no_pipe_is_waited_for(saved: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    for load in (octavo.load, DDIMPipeline.from_pretrained):
        with within(10), pytest.raises(OctavoError, match=f"{name}: is neither a file nor a folder"):
            load(folder)
    with within(10), pytest.raises(OctavoError, match=f"{name}: is no plain file"):
        read_strict(folder / name)


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fails the test, wherever the block waits, once so many seconds have passed."""

    def stop(*_: Any) -> None:
        pytest.fail(f"took more than {seconds} s")  # no `Exception`, which might be told as another

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_the_hubs_cache_is_a_folder_like_any_other(saved: Path, tmp_path: Path) -> None:
    """There every file is a link to a blob beside the snapshots."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for k, path in enumerate(sorted(saved.rglob("*.*"))):
        shutil.copy(path, blobs / str(k))
        place = snapshot / path.relative_to(saved)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(blobs / str(k), place.parent))
    for load in (octavo.load, DDIMPipeline.from_pretrained):
        assert type(load(snapshot)).__name__ == "DDIMPipeline"

"""Disks that are full or may not be written to, and two that write to one place: one line, and nothing is lost."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from tiny import tiny_pipeline

import octavo
from octavo.calibration import job
from octavo.checkpoint import save
from octavo.errors import OctavoError
from octavo.files import atomic_files, atomic_path, write_json
from octavo.runtimes import kept_graphs, openvino
from octavo.writers import UNFINISHED, only_writer

QUANTIZE = (
    "--samples",
    2,
    "--steps",
    2,
    "--recipe",
    "ptq4dm",
    "--include",
    "mid_block.*",
    "--threads",
    1,
    "--pair-limit",
)
"""With the limit nothing is said of it on CPUs without VNNI."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float") / "model"
    tiny_pipeline(levels=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the size of the digits, for whose figures no weights are fetched."""
    folder = tmp_path_factory.mktemp("grey") / "model"
    tiny_pipeline(size=16, channels=1, levels=1).save_pretrained(folder)
    return folder


@pytest.fixture
def mount() -> Iterator[Callable[[str], Path]]:
    """A file system of its own, in memory; skipped where it cannot be mounted."""
    mounted: list[Path] = []

    def make(options: str) -> Path:
        place = Path(
            tempfile.mkdtemp(prefix="octavo-disk-")
        )  # pytest removes its own folders, and cannot one of these
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            place.rmdir()
            pytest.skip("no file system can be mounted here")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(
            ["umount", "--lazy", str(place)], check=True
        )  # an engine may still have a graph mapped
        place.rmdir()


def _fails(number: int) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_what_the_system_says_is_told_in_one_line_and_the_old_file_stays(tmp_path: Path, number: int) -> None:
    path = tmp_path / "figures.json"
    write_json(path, 1)
    with pytest.raises(OctavoError) as caught, atomic_path(path) as temporary:
        temporary.write_text("half")
        _fails(number)()
    assert str(caught.value).startswith(f"{path}: cannot be written ({os.strerror(number)})")
    assert path.read_text() == "1\n" and os.listdir(tmp_path) == ["figures.json"]


def test_a_full_disk_at_the_very_end_keeps_the_calibration(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command then goes on from it, to the bits that it would have given at once."""
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    at_once, later = tmp_path / "at-once", tmp_path / "later"
    assert run(capsys, "quantize", model, "--out", at_once, *QUANTIZE)[0] == 0
    work = tmp_path / "cache" / "calibration"
    assert not any(work.iterdir())
    with monkeypatch.context() as broken:
        broken.setattr(save, "seals_of", _fails(errno.ENOSPC))
        code, _, err = run(capsys, "quantize", model, "--out", later, *QUANTIZE)
    (kept,) = work.iterdir()
    assert code == 2 and err.count("\n") == 0
    assert f"{later}: cannot be written (No space left on device)" in err and str(kept) in err
    assert not later.exists() and (kept / "observers.safetensors").is_file()

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("what was kept is collected again")

    monkeypatch.setattr("octavo.calibration.collect.capture_pairs", never)
    assert run(capsys, "quantize", model, "--out", later, *QUANTIZE)[0] == 0
    assert not any(work.iterdir())
    for path in at_once.rglob("*.safetensors"):
        assert path.read_bytes() == (later / path.relative_to(at_once)).read_bytes()


def test_a_disk_that_is_really_full(
    model: Path,
    tmp_path: Path,
    mount: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Output and cache on disks too small for them: whoever writes, libraries too, it is one line."""
    small = mount("size=64k")
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    code, _, err = run(capsys, "quantize", model, "--out", small / "int8", *QUANTIZE)
    assert code == 2 and err.startswith(f"octavo: {small}/int8: cannot be written (No space left on device)")
    assert "the calibration is kept in" in err and "\n" not in err
    assert not any(small.iterdir())
    monkeypatch.setenv("OCTAVO_CACHE", str(small / "cache"))
    code, _, err = run(capsys, "quantize", model, "--out", tmp_path / "int8", *QUANTIZE)
    assert code == 2 and "cannot be written (No space left on device)" in err and "\n" not in err
    assert not (tmp_path / "int8").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "--steps", "2"),
        ("evaluate", "--reference", "MODEL", "--steps", "2", "--no-cost"),
        (
            "study",
            "--quick",
            "--table",
            "T2",
            "--seeds",
            "1",
            "--steps",
            "2",
            "--samples",
            "2",
            "--no-low-bits",
        ),
    ],
)
def test_images_on_a_disk_that_is_really_full(
    grey: Path,
    tmp_path: Path,
    mount: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
) -> None:
    """One line, nothing that looks finished, and with room the same command ends."""
    small = mount("size=8k")
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    command, *rest = [argument.replace("MODEL", str(grey)) for argument in arguments]
    if command != "study":
        rest += ["--runtime", "torch"]
    rest += ["--num-images", "64", "--threads", "1", "--out", str(small / "out")]
    code, _, err = run(capsys, command, grey, *rest)
    assert code == 2 and "No space left on device" in err and str(small / "out") in err
    assert "\n" not in err and "Traceback" not in err
    for name in ("figures.json", "report.html", "grid.png"):
        assert not list(small.rglob(name))
    assert not any(json.loads(path.read_text())["finished"] for path in small.rglob("study.json"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
    assert run(capsys, command, grey, *rest)[0] == 0


def test_a_finished_evaluation_on_a_full_disk_stays_as_it_is(
    grey: Path,
    tmp_path: Path,
    mount: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = mount("size=24k")
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    command = ("evaluate", grey, "--reference", grey, "--steps", "2", "--no-cost", "--runtime", "torch")
    command = (*command, "--threads", "1", "--features", "digits", "--out", str(small / "out"))
    assert run(capsys, *command, "--num-images", "8")[0] == 0
    before = {path.name: path.read_bytes() for path in (small / "out").iterdir()}
    assert len(before) == 3
    code, _, err = run(capsys, *command, "--num-images", "32")
    assert code == 2 and "No space left on device" in err and "what was there is unchanged" in err
    assert "\n" not in err
    assert {path.name: path.read_bytes() for path in (small / "out").iterdir()} == before


@pytest.mark.parametrize("name", ["a", "b"])
def test_files_of_one_writer_take_their_places_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Stopped at any rename, what is there is of one writer; and the user's own files stay."""
    names = ["a", "b", "figures.json"]
    (tmp_path / "own").write_text("the user's")

    def write(text: str) -> None:
        with atomic_files(tmp_path, names) as temporary:
            for each in names:
                (temporary / each).write_text(text)

    write("old")
    real = os.replace

    def stopped(source: Any, target: Any) -> None:
        if Path(target).name == name:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(os, "replace", stopped)
        write("new")
    there = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert there.pop("own") == "the user's" and set(there.values()) <= {"new"} and "figures.json" not in there
    write("newer")
    assert {path.read_text() for path in map(tmp_path.joinpath, names)} == {"newer"}
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "figures.json", "own"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", "--out", "DISK/int8"),
        ("evaluate", "--reference", "MODEL", "--out", "DISK/figures"),
        ("sample", "--out", "DISK/images"),
        ("study", "--quick", "--out", "DISK/study"),
    ],
)
def test_a_place_that_may_not_be_written_to_is_told_before_any_work(
    model: Path,
    mount: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a network is evaluated")

    monkeypatch.setattr("diffusers.models.embeddings.Timesteps.forward", never)
    disk = mount("ro")
    told = [argument.replace("DISK", str(disk)).replace("MODEL", str(model)) for argument in arguments]
    command, *rest = told
    code, _, err = run(capsys, command, model, *rest)
    assert code == 2 and "\n" not in err
    assert "may not be written to; choose another place" in err and str(disk) in err


def test_a_cache_that_may_not_be_written_to_is_told(
    model: Path,
    tmp_path: Path,
    mount: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk = mount("ro")
    monkeypatch.setenv("OCTAVO_CACHE", str(disk / "cache"))
    code, _, err = run(capsys, "quantize", model, "--out", tmp_path / "int8", *QUANTIZE)
    assert code == 2 and "\n" not in err
    assert (
        err.startswith(f"octavo: {disk}")
        and "Read-only file system; make room or choose another place" in err
    )


def _replace_often(target: Path, name: str, barrier: Any, failures: Any) -> None:
    barrier.wait()
    try:
        for k in range(40):
            with atomic_path(target) as temporary:
                temporary.mkdir()
                for part in ("a", "b"):
                    (temporary / part).write_text(f"{name} {k}")
    except BaseException as error:
        failures.put(repr(error))


def _text_of(part: str, folder: int) -> bytes:
    file = os.open(part, os.O_RDONLY, dir_fd=folder)
    try:
        return os.read(file, 99)
    finally:
        os.close(file)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_of_two_that_write_one_folder_the_last_wins_and_no_reader_sees_a_mixture(tmp_path: Path) -> None:
    """Also not none at all: folders are exchanged in one step."""
    target = tmp_path / "model"
    spawn = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    barrier, failures = spawn.Barrier(3), spawn.Queue()
    with atomic_path(target) as temporary:
        temporary.mkdir()
        for part in ("a", "b"):
            (temporary / part).write_text("first 0")
    writers = [
        spawn.Process(target=_replace_often, args=(target, name, barrier, failures))
        for name in ("one", "two")
    ]
    for writer in writers:
        writer.start()
    barrier.wait()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        folder = os.open(target, os.O_RDONLY)  # one version, whatever takes its place meanwhile
        try:
            texts = {_text_of(part, folder) for part in ("a", "b")}
            assert len(texts) == 1
            seen += 1
        except FileNotFoundError:  # it was replaced and removed while we read
            pass
        finally:
            os.close(folder)
    for writer in writers:
        writer.join()
    assert failures.empty(), failures.get()
    assert seen
    assert os.listdir(tmp_path) == ["model"] and sorted(os.listdir(target)) == ["a", "b"]


def test_two_that_quantize_to_one_folder_are_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of other seeds, so that their work is not the same; what a killed one left is not taken for a living one."""
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out" / "int8"
    with only_writer(out):
        code, _, err = run(capsys, "quantize", model, "--out", out, *QUANTIZE)
    assert (
        code == 2
        and err == f"octavo: {out}: another process writes there; wait for it, or choose another place"
    )
    (out.parent / f".int8.0a1b2c3d{UNFINISHED}").mkdir(parents=True)
    assert run(capsys, "quantize", model, "--out", out, *QUANTIZE)[0] == 0
    assert os.listdir(out.parent) == ["int8"]


@pytest.mark.parametrize("there", [False, True])
def test_two_that_sample_or_evaluate_to_one_place_are_told(
    model: Path, grey: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], there: bool
) -> None:
    """Of other seeds; the last would win, hours later, without a word."""
    few = ("--num-images", 8, "--steps", 2, "--threads", 1, "--runtime", "torch")
    for command in (("sample", model), ("evaluate", grey, "--reference", grey, "--no-cost")):
        out = tmp_path / command[0]
        if there:
            out.mkdir()
        with only_writer(out / "figures.json" if command[0] == "evaluate" else out):
            code, _, err = run(capsys, *command, "--out", out, *few)
        assert code == 2 and err.endswith(
            "another process writes there; wait for it, or choose another place"
        )
        assert err.startswith(f"octavo: {out}") and err.count("\n") == 0
        assert os.listdir(tmp_path) == [command[0]] * there
        assert run(capsys, *command, "--out", out, *few)[0] == 0
        shutil.rmtree(out)


@pytest.mark.parametrize("target", ["run", "a/b/run"])
def test_a_relative_place_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """Python 3.12 and later make temporary folders by absolute paths: one's own was taken for another's."""
    monkeypatch.chdir(tmp_path)
    made = tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **given: os.path.abspath(made(**given)))
    with only_writer(target):
        with pytest.raises(OctavoError, match="run: another process writes there"), only_writer(target):
            raise AssertionError("both have it")
        assert Path(target).parent.is_dir()
    assert not os.listdir(), "parent folders are removed where nothing was written"
    with only_writer(target):
        Path(target).touch()
    assert Path(target).is_file()


def test_a_place_is_held_against_its_own_name_alone(tmp_path: Path) -> None:
    told = pytest.raises(OctavoError, match="run: another process writes there")
    with only_writer(tmp_path / "run.1"), only_writer(tmp_path / "run"), told, only_writer(tmp_path / "run"):
        raise AssertionError("both have it")
    assert not os.listdir(tmp_path)


def test_a_folder_in_the_place_of_a_file_is_told_and_nothing_is_removed(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "figures.json").write_text("old")
    with (
        pytest.raises(OctavoError, match="b: is a folder"),
        atomic_files(tmp_path, ["a", "b", "figures.json"]),
    ):
        raise AssertionError("nothing can be written")
    assert sorted(os.listdir(tmp_path)) == ["b", "figures.json"]


def test_two_that_quantize_the_same_are_told(model: Path, tmp_path: Path) -> None:
    recipe = octavo.PTQ4DM(samples=2, steps=2)
    pipeline = octavo.load(model)
    name = job.job_name(pipeline, recipe, 0, 16, None)
    with job.job_folder(tmp_path, name), pytest.raises(OctavoError, match="another process is calibrating"):
        octavo.quantize(pipeline, recipe, workdir=tmp_path, progress=False)


def test_work_of_another_processor_or_version_is_left_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has another name, so it is neither used nor lost."""
    recipe, pipeline = octavo.PTQ4DM(samples=2, steps=2), octavo.load(model)
    with (
        pytest.raises(KeyError),
        job.job_folder(tmp_path, job.job_name(pipeline, recipe, 0, 16, None)) as work,
    ):
        (work / "observers.safetensors").write_bytes(b"of the other one")
        raise KeyError
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "of another processor")
    octavo.quantize(pipeline, recipe, workdir=tmp_path, progress=False)
    assert [path.read_bytes() for path in tmp_path.rglob("observers.safetensors")] == [b"of the other one"]
    monkeypatch.undo()
    with pytest.raises(OctavoError, match=r"observers.safetensors: not readable; delete it and start again"):
        octavo.quantize(pipeline, recipe, workdir=tmp_path, progress=False)


def test_a_cache_of_graphs_on_a_full_disk_is_told(model: Path, mount: Callable[[str], Path]) -> None:
    """OpenVINO itself says "basic_ios::clear: iostream error"."""
    disk = mount("size=64k")
    executor = openvino.OpenVINOExecutor(octavo.load(model).unet, precision="f32", cache=disk / "cache")
    with pytest.raises(OctavoError, match=f"{disk}/cache: .*cannot be written; make room") as caught:
        executor(torch.zeros(1, 3, 8, 8), 10)
    assert "\n" not in str(caught.value)
    assert not [path for path in disk.rglob("*") if path.is_file()]


def test_graphs_of_another_processor_or_version_have_folders_of_their_own(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where only these are there a line says so. What is damaged is made again: tests/runtimes/test_openvino.py."""
    unet = octavo.load(model).unet

    def executor() -> openvino.OpenVINOExecutor:
        return openvino.OpenVINOExecutor(unet, precision="f32", cache=tmp_path)

    here = executor()
    here(torch.zeros(1, 3, 8, 8), 10)
    assert here.kept.folder is not None and executor().kept.folder == here.kept.folder and not caplog.records
    before = {path: path.read_bytes() for path in here.kept.folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(kept_graphs, "FORMAT", "of another version")
    other = executor()
    other(torch.zeros(1, 3, 8, 8), 10)
    (line,) = [record.message for record in caplog.records]
    assert line.startswith(
        f"{here.kept.folder}: is of another version or processor; the graphs are made anew"
    )
    caplog.clear()
    executor()(torch.zeros(1, 3, 8, 8), 10)  # its own are there now
    assert not caplog.records
    assert {path: path.read_bytes() for path in here.kept.folder.rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    monkeypatch.setattr(kept_graphs, "processor", lambda core: ["INT8", "of another processor"])
    there = executor()
    assert len({here.kept.folder, other.kept.folder, there.kept.folder}) == 3
    there(torch.zeros(1, 3, 8, 8), 10)
    assert [record.message.count("is of another version or processor") for record in caplog.records] == [1]

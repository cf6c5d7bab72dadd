"""What is wrong with a name on the command line is said before anything that takes seconds is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.cli import bench, inputs, shared
from octavo.errors import OctavoError
from octavo.evaluation.peers.architectures import ARCHITECTURES
from octavo.named import can_be_read_again

MISTAKES = {
    "no path": ("quantize {}/none --out {}/out", "{}/none: is no folder here; check the path"),
    "a file": (
        "sample {}/bad.json --out a.png",
        "{}/bad.json: is a file; give the folder of a diffusers pipeline",
    ),
    "another folder": ("audit {}", "{}: has no model_index.json, so it is not a diffusers pipeline folder"),
    "bench": ("bench ./none", "./none: is no folder here; check the path"),
    "evaluate": ("evaluate digits --reference ./none", "./none: is no folder here; check the path"),
    "report": ("report ./none", "./none: is no folder here; check the path"),
    "report's folder": (
        "report {}",
        "{}: holds neither a pipeline (model_index.json), a study (study.json) nor",
    ),
    "trajectory": ("sample digits --out a.png --trajectory {}/none.json", "{}/none.json: cannot be read"),
    "reuse": ("sample digits --out a.png --reuse {}/bad.json", "{}/bad.json: is not JSON"),
    "bits": ("quantize digits --out {}/out --bits-file {}/none.json", "{}/none.json: cannot be read"),
    "prompts": (
        "quantize digits --out {}/out --prompts {}/none.txt",
        "--prompts: {}/none.txt cannot be read",
    ),
    "image": (
        "sample digits --out a.png --image {}/none.png",
        "--image: {}/none.png cannot be read as a picture",
    ),
    "input": ("sample digits --out a.png --input scale", "--input: 'scale' is not of the form name=value"),
}
"""Arguments, and how the line begins; {} is a folder that holds bad.json alone."""

PROGRAM = """
import contextlib, io, json, sys
from octavo.cli import main

said = []
for arguments in json.loads(sys.argv[1]):
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as stop:
            code = stop.code
    said.append([code, err.getvalue()])
heavy = [name for name in ("torch", "diffusers", "openvino", "numpy") if name in sys.modules]
print(json.dumps([said, heavy]))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[object]], list[str], Path]:
    """Code and line for each of MISTAKES, all in one process; and what it has imported by then."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "bad.json").write_text("{")
    commands = [arguments.replace("{}", str(folder)).split() for arguments, _ in MISTAKES.values()]
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)], capture_output=True, text=True, check=True
    )
    said, heavy = json.loads(ran.stdout)
    return dict(zip(MISTAKES, said, strict=True)), heavy, folder


def test_bench_knows_its_architectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lies in a folder of such a name."""
    monkeypatch.chdir(tmp_path)
    for name in ARCHITECTURES:
        Path(name).mkdir()
        assert bench._check_model(name) == name
    assert set(bench.ARCHITECTURES) == set(ARCHITECTURES)


def test_what_is_in_a_pipe_is_left_to_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("what is read of a pipe is gone")

    monkeypatch.setattr(shared, "read_json", read)
    monkeypatch.setattr(inputs.Given, "inputs", read)
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)

    def command(*, given: inputs.Given) -> None:
        got.append(given.prompts)

    assert shared.check_given_json(pipe) == pipe
    options = dict.fromkeys(inputs.OPTIONS)
    inputs.takes_inputs(command)(**{**options, "prompts": pipe})
    assert got == [pipe]
    with pytest.raises(AssertionError, match="gone"):
        inputs.takes_inputs(command)(**{**options, "prompts": tmp_path / "none"})


def test_a_path_that_cannot_be_asked_for_is_told_by_who_reads_it() -> None:
    assert can_be_read_again(Path("a prompt " * 100))
    with pytest.raises(OctavoError, match="cannot be read"):
        shared.check_given_json(Path("a" * 1000))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_line_names_it(answers: tuple[dict[str, list[object]], list[str], Path], mistake: str) -> None:
    said, _, folder = answers
    code, line = said[mistake]
    assert code == 2
    assert str(line).startswith(f"octavo: {MISTAKES[mistake][1].replace('{}', str(folder))}")
    assert str(line).count("\n") == 1


def test_torch_is_not_imported_for_it(answers: tuple[dict[str, list[object]], list[str], Path]) -> None:
    assert answers[1] == []

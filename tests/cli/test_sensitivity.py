"""`octavo sensitivity` as a user runs it, and `octavo quantize` with the bits that it chose."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from octavo.cli import main

QUICK = (
    "--samples",
    "4",
    "--calibration-steps",
    "2",
    "--num-images",
    "2",
    "--steps",
    "2",
    "--recipe",
    "ptq4dm",
)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_the_bits_that_it_chooses_are_those_that_quantize_takes(  # type: ignore[no-untyped-def]
    pipeline, make_pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline.save_pretrained("tiny")
    code, out, err = run(capsys, "sensitivity", "tiny", "--budget", "size=0.22", *QUICK)
    assert code == 0, err
    assert "rank correlation" in out and "size=0.22: " in out
    told = dict(line.split(": ", 1) for line in out.splitlines() if line.startswith(("bits: ", "next: ")))
    octavo_, *command = shlex.split(told["next"])
    code, printed, err = run(capsys, *command, "--json")
    assert octavo_ == "octavo" and code == 0, err
    assert "under a recipe" not in err
    other = [*command[: command.index("--out")], "--out", "q", *command[command.index("--out") + 2 :]]
    code, _, err = run(capsys, *other, "--metric", "minmax")
    assert code == 0 and "under a recipe with other values of metric" in err
    assert json.loads(printed)["size_ratio"] <= 0.22
    config = json.loads(Path("tiny-mixed/unet/config.json").read_text())["quantization_config"]
    chosen = json.loads(Path(told["bits"]).read_text())["layers"]
    names = {name for group in config["layers"] for name in group["names"]}
    assert names == {name for name, bits in chosen.items() if bits != "float"}

    code, printed, err = run(capsys, "sensitivity", "tiny", "--budget", "size=0.3", "--json", *QUICK)
    assert code == 0, err  # what was measured serves again
    assert json.loads(printed)["chosen"]["cost"]["model"] <= 0.3
    code, _, err = run(capsys, "sensitivity", "tiny", "--budget", "size=0.01", *QUICK)
    assert code == 2 and "cannot be reached; this model goes from" in err
    make_pipeline(seed=1).save_pretrained("other")
    code, _, err = run(
        capsys,
        "quantize",
        "other",
        "--out",
        "q",
        "--bits-file",
        told["bits"],
        "--samples",
        "2",
        "--steps",
        "2",
    )
    assert code == 2 and "was made for another model" in err


def test_the_default_recipe_is_chosen_for_and_quantized_by_as_it_was_measured(  # type: ignore[no-untyped-def]
    pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Layers with 32 activation bits are in its file; what float activations it would choose is left out, and told."""
    monkeypatch.chdir(tmp_path)
    pipeline.save_pretrained("tiny")
    code, out, err = run(capsys, "sensitivity", "tiny", "--budget", "size=0.3", *QUICK[:-2])
    assert code == 0, err
    told = dict(line.split(": ", 1) for line in out.splitlines() if line.startswith(("bits: ", "next: ")))
    _, *command = shlex.split(told["next"])
    assert command[command.index("--float-activations") + 1] == "0"
    written = json.loads(Path(told["bits"]).read_text())
    chosen = {name: bits for name, bits in written["layers"].items() if bits != "float"}
    assert {bits[1] for bits in chosen.values()} == {8, 32}
    i = command.index("--float-activations")
    for arguments in (command, [*command[:i], *command[i + 2 :]]):
        code, _, err = run(capsys, *arguments)
        assert code == 0, err
        assert ("under a recipe with other values of float_activations" in err) == (arguments != command)
        config = json.loads(Path("tiny-mixed/unet/config.json").read_text())["quantization_config"]
        assert chosen == {
            name: [group["weights"]["bits"], group["activations"]["bits"]]
            for group in config["layers"]
            for name in group["names"]
        }


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--budget", "size=small"), "is not of the form size=0.2 or latency=1.1"),
        (("--bits-file", "b.json"), "--bits-file: needs a --budget"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(  # type: ignore[no-untyped-def]
    arguments: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "sensitivity", "no-such-model", *arguments)
    assert code == 2 and told in err and not list(tmp_path.iterdir())


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "sensitivity", "--help")
    assert code == 0 and "Example: octavo sensitivity" in " ".join(out.split())

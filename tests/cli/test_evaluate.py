"""`octavo evaluate` as a user runs it, in both forms, alone and under a launcher."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from octavo.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error without progress bars."""
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *map(str, arguments)])
    out, err = capsys.readouterr()
    lines = [line for line in err.replace("\r", "\n").splitlines() if line and "|" not in line]
    return int(stop.value.code or 0), out, "\n".join(lines)


@pytest.fixture(scope="module")
def model(pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("evaluate") / "tiny"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def common(model: Path) -> tuple[object, ...]:
    options = ("--num-images", 10, "--steps", 2, "--batch-size", 4, "--features", "digits", "--threads", 1)
    return ("--reference", model, *options)


@pytest.fixture(scope="module")
def kept(saved: Path, common, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    """What one process wrote for the quantized model, without the costs."""
    out = tmp_path_factory.mktemp("kept") / "one"
    with pytest.raises(SystemExit) as stop:
        main([str(part) for part in ("evaluate", saved, *common, "--no-cost", "--out", out, "--json")])
    assert not stop.value.code
    return out


def arrays(folder: Path) -> list[np.ndarray]:
    found = []
    for name in ("images.npz", "reference-images.npz"):
        with np.load(folder / name) as file:
            found.append(file["arr_0"])
    return found


def test_the_figures_say_how_they_were_made(kept: Path, cache: Path) -> None:
    figures = json.loads((kept / "figures.json").read_text())
    assert figures["num_images"] == 10 and figures["threads"] == 1 and figures["processes"] == 1
    assert figures["scheduler"] == "DDIMScheduler" and figures["precision"] == "f32"
    in_int8, _, layers = figures["layers_in_int8"].split()
    assert in_int8 == layers and int(layers) > 10
    comparison = figures["comparison"]
    assert comparison["count"] == 10 and comparison["paired"] and comparison["psnr"]["value"] > 15
    assert comparison["psnr"]["low"] < comparison["psnr"]["value"] < comparison["psnr"]["high"]
    assert "fd_real" not in comparison  # these images are not digits
    assert figures["cost"] is None and "PSNR" in figures["verdict"]
    ours, theirs = arrays(kept)
    assert ours.shape == theirs.shape == (10, 8, 8, 3) and ours.dtype == np.uint8
    assert not np.array_equal(ours, theirs)
    assert not list((cache / "evaluation").iterdir()), "the shards are gone"


def test_costs_stand_side_by_side(saved: Path, common, capsys) -> None:  # type: ignore[no-untyped-def]
    code, out, err = run(capsys, saved, *common, "--scheduler", "ddpm")
    assert code == 0, err
    assert "DDPMScheduler" in out and "verdict: " in out.splitlines()[-1]
    for row in ("size of the denoiser", "BOPs of one evaluation", "one evaluation, batch 4", "peak memory"):
        assert row in out
    assert "x smaller" in out and "PSNR" in out


def test_images_made_elsewhere_get_the_same_figures(kept: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    both = ("--images", kept / "images.npz", "--reference-images", kept / "reference-images.npz")
    code, out, err = run(capsys, *both, "--features", "digits", "--same-seeds", "--json")
    assert code == 0, err
    compared = json.loads(out)["comparison"]
    generated = json.loads((kept / "figures.json").read_text())["comparison"]
    for name in ("fd", "kid", "precision"):
        assert compared[name] == generated[name]
    assert compared["psnr"]["value"] == pytest.approx(generated["psnr"]["value"], abs=0.5)  # 8 bits
    unpaired = json.loads(run(capsys, *both, "--features", "digits", "--json")[1])["comparison"]
    assert "psnr" not in unpaired and unpaired["fd"]["value"] == compared["fd"]["value"]


def test_two_processes_print_once_and_make_the_same_images(  # type: ignore[no-untyped-def]
    saved: Path, common, kept: Path, tmp_path: Path
) -> None:
    accelerate = shutil.which("accelerate", path=str(Path(sys.executable).parent))
    assert accelerate
    command = [accelerate, "launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0, "-m", "octavo"]
    command += ["evaluate", saved, *common, "--no-cost", "--json", "--out", tmp_path / "two"]
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)  # one document: the second process printed nothing
    assert figures["processes"] == 2
    for ours, alone in zip(arrays(tmp_path / "two"), arrays(kept), strict=True):
        assert np.array_equal(ours, alone)
    assert figures["comparison"] == json.loads((kept / "figures.json").read_text())["comparison"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["MODEL"], "--reference"),
        ([], "--reference"),
        (["--images", "A"], "--reference-images"),
        (["MODEL", "--images", "A", "--reference-images", "A"], "MODEL"),
        (["--images", "A", "--reference-images", "A", "--steps", "3"], "--steps"),
        (["--images", "NOWHERE", "--reference-images", "A", "--features", "digits"], "nowhere"),
        (["MODEL", "--reference", "MODEL", "--same-seeds"], "--same-seeds"),
        (["MODEL", "--reference", "digits", "--features", "digits"], "not one model"),
        (["MODEL", "--reference", "OTHER", "--features", "digits"], "--scheduler: "),
        (["MODEL", "--reference", "MODEL", "--features", "digitz"], "digitz"),
        (["MODEL", "--reference", "MODEL", "--scheduler", "euler"], "euler"),
        (["MODEL", "--reference", "MODEL", "--out", "/dev/null/x"], "/dev/null"),
        (["MODEL", "--reference", "MODEL"], "inception"),
    ],
)
def test_errors_are_one_line_before_anything_is_generated(  # type: ignore[no-untyped-def]
    model: Path, kept: Path, tmp_path: Path, capsys, monkeypatch, arguments: list[str], told: str
) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    settings = other / "scheduler/scheduler_config.json"
    settings.write_text(settings.read_text().replace('"beta_end": 0.02', '"beta_end": 0.03'))
    monkeypatch.setattr("octavo.cli.evaluate_models.generate_shards", None)
    monkeypatch.delenv("OCTAVO_INCEPTION", raising=False)
    places = {"MODEL": str(model), "OTHER": str(other), "A": str(kept / "images.npz"), "NOWHERE": "./nowhere"}
    code, out, err = run(capsys, *[places.get(argument, argument) for argument in arguments])
    assert code == 2 and not out
    assert told in err and len(err.splitlines()) == 1, err


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0 and "Example: octavo evaluate" in " ".join(out.split())

"""`octavo evaluate` as a user runs it, in both forms, alone and under a launcher."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest

from octavo.cli import main
from octavo.evaluation.digits import DigitFeatures, reference_statistics
from octavo.evaluation.features import Features, extract
from octavo.evaluation.frechet import FeatureStatistics, fd_infinity, frechet_distance
from octavo.evaluation.kernel import kernel_distance
from octavo.evaluation.similarity import psnr

OF_DIGITS = ("--reference", "MODEL", "--features", "digits")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    return command_line.run(capsys, "evaluate", *arguments)


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
def kept(saved: Path, common, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    """What one process wrote for the quantized model, without the costs."""
    out = tmp_path_factory.mktemp("kept") / "one"
    before = shards(cache)
    with pytest.raises(SystemExit) as stop:
        main([str(part) for part in ("evaluate", saved, *common, "--no-cost", "--out", out, "--json")])
    assert not stop.value.code
    assert shards(cache) == before, "the shards are gone"
    return out


def shards(cache: Path) -> list[Path]:
    """Those of other tests among them, whose command was refused or killed."""
    return sorted((cache / "evaluation").glob("*"))


def arrays(folder: Path) -> list[np.ndarray]:
    found = []
    for name in ("images.npz", "reference-images.npz"):
        with np.load(folder / name) as file:
            found.append(file["arr_0"])
    return found


def test_the_figures_say_how_they_were_made(kept: Path) -> None:
    figures = json.loads((kept / "figures.json").read_text())
    assert figures["num_images"] == 10 and figures["threads"] == 1 and figures["processes"] == 1
    assert figures["scheduler"] == "DDIMScheduler" and figures["precision"] == "f32"
    in_int8, _, layers = figures["layers_in_int8"].split()
    assert in_int8 == layers and int(layers) > 10
    comparison = figures["comparison"]
    assert comparison["count"] == 10 and comparison["paired"] and comparison["psnr"]["value"] > 15
    assert "fd_real" not in comparison  # these images are not digits
    assert figures["cost"] is None and "PSNR" in figures["verdict"]
    ours, theirs = arrays(kept)
    assert ours.shape == theirs.shape == (10, 8, 8, 3) and ours.dtype == np.uint8
    decibels = psnr(ours / np.float32(255), theirs / np.float32(255))  # of 8 bits: not quite the same
    half = 2.26216 * decibels.std(ddof=1) / 10**0.5  # t(9)
    ends = [comparison["psnr"][end] for end in ("low", "value", "high")]
    assert ends == pytest.approx([decibels.mean() - half, decibels.mean(), decibels.mean() + half], abs=0.3)


def test_costs_stand_side_by_side(saved: Path, common, capsys) -> None:  # type: ignore[no-untyped-def]
    code, out, err = run(capsys, saved, *common, "--scheduler", "ddpm")
    assert code == 0, err
    assert "DDPMScheduler" in out and "verdict: " in out.splitlines()[-1]
    for row in ("size of the denoiser", "BOPs of one evaluation", "one evaluation, batch 4", "peak memory"):
        assert row in out
    assert "x smaller" in out and "PSNR" in out


def test_without_features_there_are_figures_of_pairs(saved: Path, common, kept: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    """What a model needs for which nobody has made Inception's weights."""
    plain = [argument for argument in common if argument not in ("--features", "digits")]
    code, out, err = run(capsys, saved, *plain, "--features", "none", "--no-cost", "--json")
    assert code == 0, err
    figures = json.loads(out)
    kept_figures = json.loads((kept / "figures.json").read_text())["comparison"]
    assert figures["comparison"]["psnr"] == kept_figures["psnr"]
    assert not {"fd", "kid", "p_same", "precision"} & figures["comparison"].keys()


def test_images_made_elsewhere_get_the_same_figures(kept: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    both = ("--images", kept / "images.npz", "--reference-images", kept / "reference-images.npz")
    code, out, err = run(capsys, *both, "--features", "digits", "--same-seeds", "--json")
    assert code == 0, err
    compared = json.loads(out)["comparison"]
    generated = json.loads((kept / "figures.json").read_text())["comparison"]
    for name in ("fd", "kid", "precision"):
        assert compared[name] == generated[name]
    assert compared["psnr"]["value"] == pytest.approx(generated["psnr"]["value"], abs=0.5)  # 8 bits
    alone = json.loads(run(capsys, *both, "--features", "none", "--same-seeds", "--json")[1])
    assert alone["comparison"]["psnr"] == compared["psnr"] and "fd" not in alone["comparison"]
    assert alone["comparison"]["features"] == "none" and "no features were asked for" in alone["verdict"]
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


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Grey 16x16 images of three shades: 80 "ours", 80 "theirs", 40 "real" and three that are too "few"."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = {}
    for name, count, brightest in (("ours", 80, 256), ("theirs", 80, 128), ("real", 40, 64), ("few", 3, 64)):
        paths[name] = folder / f"{name}.npz"
        np.savez(paths[name], rng.integers(0, brightest, (count, 16, 16, 1), dtype=np.uint8))
    return paths


def seen(path: Path, count: int | None = None) -> Features:
    """What the digit classifier sees in a file's images."""
    with np.load(path) as file:
        return extract(DigitFeatures(), file["arr_0"][:count])


def compared(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code, out, err = run(capsys, *arguments, "--features", "digits", "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)["comparison"]
    return found


def test_real_images_take_the_place_of_the_bundled_digits(pictures, capsys) -> None:  # type: ignore[no-untyped-def]
    both = ("--images", pictures["ours"], "--reference-images", pictures["theirs"])
    bundled, given = compared(capsys, *both), compared(capsys, *both, "--real-images", pictures["real"])
    digits, real = reference_statistics()["train"], seen(pictures["real"])
    for figures, target in ((bundled, digits), (given, FeatureStatistics.of(real.pooled))):
        for name, side in (("fd_real", "ours"), ("fd_real_reference", "theirs")):
            expected = frechet_distance(seen(pictures[side]).pooled, target)
            assert figures[name]["value"] == pytest.approx(expected, rel=1e-6)
    assert given["kid_real"]["value"] == pytest.approx(
        kernel_distance(seen(pictures["ours"]).pooled, real.pooled).value, rel=1e-6
    )
    of_images = {"sfd_real", "kid_real", "precision_real", "recall_real"}
    assert (
        of_images <= given.keys() and not of_images & bundled.keys()
    )  # of digits there are statistics alone
    for name in ("fd", "sfd", "kid", "precision", "inception_score", "p_same"):
        assert given[name] == bundled[name]
    assert [any(f"real data: {count}" in note for note in given["notes"]) for count in (40, 1437)] == [1, 0]
    assert "fd_infinity" not in given.keys() | bundled.keys()


def test_fd_infinity_is_the_distance_to_the_same_real_data(pictures, capsys) -> None:  # type: ignore[no-untyped-def]
    both = ("--images", pictures["ours"], "--reference-images", pictures["theirs"], "--fd-infinity")
    ours, theirs = (seen(pictures[name]).pooled for name in ("ours", "theirs"))
    real = FeatureStatistics.of(seen(pictures["real"]).pooled)
    found = compared(capsys, *both, "--real-images", pictures["real"])
    assert found["fd_infinity"]["value"] == pytest.approx(fd_infinity(ours, real), rel=1e-5)
    assert found["fd_infinity_reference"]["value"] == pytest.approx(fd_infinity(theirs, real), rel=1e-5)
    code, out, _ = run(capsys, *both, "--features", "digits")
    to_digits = fd_infinity(ours, reference_statistics()["train"])
    (line,) = [line for line in out.splitlines() if line.strip().startswith("FD-infinity ")]
    assert code == 0 and f"{to_digits:.2f}" in line and "reference" in line


def test_fd_infinity_of_few_images_is_left_out_with_a_note(kept: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    both = ("--images", kept / "images.npz", "--reference-images", kept / "reference-images.npz")
    found = compared(capsys, *both, "--fd-infinity")
    assert "fd_infinity" not in found
    assert "FD-infinity: left out, 10 images are fewer than 80" in found["notes"]


def test_generated_images_are_compared_with_real_ones(  # type: ignore[no-untyped-def]
    saved: Path, model: Path, pictures, tmp_path: Path, capsys
) -> None:
    """Colour images of 8x8, which no bundled digits suit."""
    quick = ("--num-images", 80, "--steps", 1, "--batch-size", 40, "--runtime", "torch", "--no-cost")
    real, out = pictures["real"], tmp_path / "out"
    asked = ("--real-images", real, "--fd-infinity", "--out", out)
    found = compared(capsys, saved, "--reference", model, *quick, *asked)
    target = FeatureStatistics.of(seen(real).pooled)
    for name, file in (("fd_real", "images.npz"), ("fd_real_reference", "reference-images.npz")):
        assert found[name]["value"] == pytest.approx(
            frechet_distance(seen(out / file).pooled, target), rel=1e-6
        )
    figures = json.loads((out / "figures.json").read_text())
    assert figures["real_images"] == str(real) and figures["extrapolate"] is True
    pooled = seen(out / "images.npz").pooled
    assert found["fd_infinity"]["value"] == pytest.approx(fd_infinity(pooled, target), rel=1e-5)


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
        (["MODEL", "--reference", "MODEL", "--scheduler", "eulr"], "eulr"),
        (["MODEL", "--reference", "MODEL", "--out", "/dev/null/x"], "/dev/null"),
        (["MODEL", "--reference", "MODEL"], "inception"),
        (["MODEL", *OF_DIGITS, "--real-images", "NOWHERE"], "nowhere: does not exist"),
        (["MODEL", *OF_DIGITS, "--real-images", "FEW"], "few.npz holds 3; give at least 8"),
        (
            ["--images", "A", "--reference-images", "A", "--features", "digits", "--real-images", "FEW"],
            "at least 8",
        ),
        (
            ["--images", "A", "--reference-images", "A", "--features", "digits", "--real-images", "NO"],
            "is not an .npz",
        ),
        (
            ["--images", "A", "--reference-images", "A", "--features", "digits", "--real-images", "B"],
            "got float64",
        ),
        (
            ["--images", "A", "--reference-images", "A", "--features", "none"],
            "only figures of same-seed pairs",
        ),
        (
            ["MODEL", "--reference", "MODEL", "--features", "none", "--fd-infinity"],
            "--fd-infinity: is a dist",
        ),
        (["MODEL", "--reference", "MODEL", "--features", "none", "--real-images", "A"], "--real-images: are"),
    ],
)
def test_errors_are_one_line_before_anything_is_generated(  # type: ignore[no-untyped-def]
    model: Path, kept: Path, pictures, tmp_path: Path, capsys, monkeypatch, arguments: list[str], told: str
) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    settings = other / "scheduler/scheduler_config.json"
    settings.write_text(settings.read_text().replace('"beta_end": 0.02', '"beta_end": 0.03'))
    monkeypatch.setattr("octavo.cli.evaluate_models.generate_shards", None)
    monkeypatch.delenv("OCTAVO_INCEPTION", raising=False)
    (tmp_path / "no.npz").write_text("no images")
    np.savez(tmp_path / "b.npz", np.zeros((9, 16, 16, 1)))
    places = {"MODEL": str(model), "OTHER": str(other), "A": str(kept / "images.npz"), "NOWHERE": "./nowhere"}
    places |= {"FEW": str(pictures["few"]), "NO": str(tmp_path / "no.npz"), "B": str(tmp_path / "b.npz")}
    code, out, err = run(capsys, *[places.get(argument, argument) for argument in arguments])
    assert code == 2 and not out
    assert told in err and len(err.splitlines()) == 1, err


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0 and "Example: octavo evaluate" in " ".join(out.split())

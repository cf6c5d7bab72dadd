"""`octavo study` as a user runs it, on a tiny pipeline folder."""

from __future__ import annotations

import json
from pathlib import Path

import command_line
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from octavo.evaluation.digits import DigitFeatures
from octavo.evaluation.features import extract
from octavo.evaluation.frechet import FeatureStatistics, frechet_distance
from octavo.evaluation.generate import to_uint8
from octavo.quantization import ranges
from octavo.study import workbench
from octavo.study.workbench import Workbench

SIZE = {"seeds": 1, "num-images": 8, "steps": 3, "samples": 8, "batch-size": 8, "table": "T2"}
SMALL = ["--quick", "--no-low-bits", *(f"--{name}={value}" for name, value in SIZE.items())]
DIGITS = ("--features", "digits")


@pytest.fixture(autouse=True)
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled: torch simulates, which for so small a network is quicker. Ranges are searched coarsely."""
    monkeypatch.setattr(ranges, "CANDIDATES", 5)
    monkeypatch.setattr(workbench, "execute", lambda pipeline, *rest: (pipeline, "simulation (torch)"))


@pytest.fixture(scope="module")
def model(pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("study") / "tiny"
    pipeline.save_pretrained(folder)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    return command_line.run(capsys, "study", *arguments)


def pooled(images: np.ndarray) -> torch.Tensor:
    return extract(DigitFeatures(), images).pooled


def test_it_measures_and_says_where(model: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    arguments = (model, "--out", tmp_path / "out", *SMALL, *DIGITS)
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    assert "study.md: 4 cells" in out
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "Calibration source" in page and "noise x_T" in page
    study = json.loads((tmp_path / "out/study.json").read_text())
    assert [table["name"] for table in study["tables"]] == ["T2"] and study["finished"]
    assert not any("fd_real" in row["figures"] for row in study["tables"][0]["rows"])  # these are no digits
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0 and json.loads(out)["cells"]["done"] == 4


def test_real_images_are_x0_and_what_every_row_is_compared_with(  # type: ignore[no-untyped-def]
    model: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", real)
    clean: dict[str, torch.Tensor] = {}
    sampled: dict[str, np.ndarray] = {}
    pairs_from, measure, compared = workbench.pairs_from, Workbench.measure, Workbench._compared

    def watched_pairs(source, pairs, folder, scheduler, x_0, **rest):  # type: ignore[no-untyped-def]
        store = pairs_from(source, pairs, folder, scheduler, x_0, **rest)
        clean[source] = torch.cat([pair.args["sample"] for batch in store for pair in batch])
        return store

    def watched_measure(self, cell):  # type: ignore[no-untyped-def]
        def keep(images, reference):  # type: ignore[no-untyped-def]
            sampled[cell.variant.source] = to_uint8(images)
            return compared(self, images, reference)

        self._compared = keep
        return measure(self, cell)

    monkeypatch.setattr(workbench, "pairs_from", watched_pairs)
    monkeypatch.setattr(Workbench, "measure", watched_measure)
    out = tmp_path / "out"
    code, _, err = run(capsys, model, "--out", out, *SMALL, *DIGITS, "--images", tmp_path / "real.npz")
    assert code == 0, err

    (table,) = json.loads((out / "study.json").read_text())["tables"]
    found = dict(
        zip(
            ("full precision", "noise", "raw", "forward", "denoising"),
            (row["figures"]["fd_real"]["value"] for row in table["rows"]),
            strict=True,
        )
    )
    (references,) = out.glob("references/*.safetensors")
    sampled["full precision"] = to_uint8(load_file(references)["images"].numpy())
    target = FeatureStatistics.of(pooled(real))
    assert sampled.keys() == found.keys() and len(set(found.values())) == 5
    for name, value in found.items():
        assert value == pytest.approx(frechet_distance(pooled(sampled[name]), target), rel=1e-6), name

    given = {image.tobytes() for image in real}
    raw = ((clean["raw"].permute(0, 2, 3, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    assert len(raw) == 8 and all(image.tobytes() in given for image in raw)
    assert len({image.tobytes() for image in raw}) == 2, "the four pairs of an image have its x_0"
    assert "FD to real" in (out / "study.md").read_text()


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (None, "nowhere.npz: does not exist"),
        (np.zeros((9, 8, 8, 3)), "got float64"),
        (np.zeros((9, 8, 6, 3), dtype=np.uint8), "images: of 3 x 8 x 6"),
        (np.zeros((7, 8, 8, 3), dtype=np.uint8), "images: 7 are too few"),
    ],
)
def test_images_that_do_not_fit_are_one_line_before_anything_is_written(  # type: ignore[no-untyped-def]
    model: Path, tmp_path: Path, capsys, images: np.ndarray | None, told: str
) -> None:
    path = tmp_path / "nowhere.npz"
    if images is not None:
        np.savez(path, images)
    code, out, err = run(capsys, model, "--out", tmp_path / "out", *SMALL, *DIGITS, "--images", path)
    assert code == 2 and not out
    assert told in err and len(err.splitlines()) == 1, err
    assert not (tmp_path / "out").exists()

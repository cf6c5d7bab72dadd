"""`octavo export`: what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run

from octavo.errors import OctavoError


def test_export_says_what_it_wrote(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "exported"
    code, printed, err = run(capsys, "export", saved, "--out", out, "--format", "openvino", "--json")
    assert code == 0, err
    figures = json.loads(printed)
    assert figures["in_int8"] == figures["audited"] == figures["quantized_layers"] > 0
    assert figures["distance_to_simulation"] < 0.05
    assert {path.name for path in out.iterdir()} == {
        "denoiser.xml",
        "denoiser.bin",
        "export.json",
        "scheduler",
    }
    sizes = [(out / name).stat().st_size for name in ("denoiser.xml", "denoiser.bin")]
    assert figures["bytes"] == sum(sizes) and figures["engine"] == "OpenVINO"


def test_the_runtime_onnx_is_audited_and_samples(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    code, printed, err = run(capsys, "audit", saved, "--runtime", "onnx", "--json")
    assert code == 0, err
    figures = json.loads(printed)
    assert figures["in_int8"] == figures["audited"] > 0
    assert {layer["kernel"] for layer in figures["layers"]} == {"MatMulIntegerToFloat"}
    images = {}
    for runtime in ("onnx", "torch"):
        out = tmp_path / f"{runtime}.npz"
        arguments = ("--num-images", 2, "--steps", 2, "--runtime", runtime, "--out", out)
        code, printed, err = run(capsys, "sample", saved, *arguments)
        assert code == 0 and f"({runtime}, 2 steps)" in printed, err
        images[runtime] = np.load(out)["arr_0"].astype(int)
    assert abs(images["onnx"] - images["torch"]).mean() < 2


def test_eta_is_part_of_what_is_exported(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen(pipeline: Any, *_: Any, inputs: dict[str, Any], **__: Any) -> None:
        raise OctavoError(f"{type(pipeline.scheduler).__name__} {pipeline.scheduler.config.eta} {inputs}")

    monkeypatch.setattr("octavo.runtimes.export", seen)
    arguments = ("--out", tmp_path / "out", "--format", "openvino", "--eta", "0.5")
    assert "DDIMEtaScheduler 0.5 {}" in run(capsys, "export", saved, *arguments)[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--format", "openvino", "--dialect", "onnxruntime"), "--dialect: onnxruntime is for --format onnx"),
        (("--format", "gguf"), "'gguf' is not one of"),
        ((), "--format"),
    ],
)
def test_what_it_refuses(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    code, printed, err = run(capsys, "export", saved, "--out", tmp_path / "out", *arguments)
    assert code == 2 and not printed and said in err and len(err.splitlines()) == 1, err


def test_it_replaces_no_model_and_nothing_of_the_user_s(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("export", saved, "--format", "openvino", "--out")
    assert "is the model itself" in run(capsys, *common, saved)[2]
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "holds something else than an export" in run(capsys, *common, tmp_path)[2]
    assert (tmp_path / "thesis.tex").is_file()


def test_a_portable_file_that_is_part_float_names_the_dialect_that_is_not(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    code, out, err = run(capsys, "export", saved, "--out", tmp_path / "out", "--format", "onnx")
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if "layers with integer activations run" in line]
    in_int8, _, layers, *_ = line.split()
    assert int(in_int8) < int(layers) and "--dialect onnxruntime has all in int8" in out


def test_a_float_model_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "export", "digits", "--out", tmp_path / "out", "--format", "openvino")
    assert code == 2 and "has no quantized layers" in err

"""The commands as a user runs them, on a tiny pipeline folder."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from PIL import Image

import octavo
from octavo.cli import main
from octavo.errors import OctavoError
from octavo.runtimes import saturation
from octavo.runtimes.saturation import adds_in_16_bits

COMMANDS = (
    "quantize",
    "sample",
    "audit",
    "bench",
    "demo",
    "evaluate",
    "study",
    "report",
    "trajectory",
    "analytic",
    "tune",
)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


@pytest.fixture(scope="module")
def model(pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def int8(model: Path) -> Path:
    out = model.parent / "tiny-int8"
    with pytest.raises(SystemExit) as stop:
        main(
            ["quantize", str(model), "--out", str(out), "--samples", "8", "--steps", "4", "--batch-size", "4"]
        )
    assert not stop.value.code
    return out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0 and f"octavo {command}" in out and "Example: octavo" in " ".join(out.split())


def test_the_command_that_quantize_prints_works(dit, tmp_path: Path, capsys, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    dit.save_pretrained("dit")
    quick = ("--samples", "2", "--steps", "2", "--recipe", "ptq4dm", "--class-labels", "1,5")
    code, out, err = run(capsys, "quantize", "dit", "--out", "dit int8", *quick)
    assert code == 0, err
    told = dict(line.split(": ", 1) for line in out.splitlines())
    assert Path(told["model card"]).read_text().startswith("---")
    octavo_, *command = shlex.split(told["next"])
    assert octavo_ == "octavo"
    code, _, err = run(capsys, *command, "--steps", "2", "--num-images", "2")
    assert code == 0 and Path("grid.png").is_file(), err


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["--class-labels", "12,1000"], "1000 is out of range; this model has 1,000 classes"),
        ([], "(--class-labels)"),
    ],
)
def test_labels_that_do_not_fit_are_told_in_one_line(  # type: ignore[no-untyped-def]
    dit, tmp_path: Path, capsys, labels: list[str], told: str
) -> None:
    dit.save_pretrained(tmp_path / "dit")
    code, _, err = run(capsys, "quantize", tmp_path / "dit", "--out", tmp_path / "out", *labels)
    assert code == 2 and told in err and "--class-labels" in err and len(err.splitlines()) == 1, err


def test_the_help_of_patterns_says_what_each_does(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "quantize", "--help")
    text = " ".join(out.split())
    assert "--exclude PATTERN Leave the layers" in text and "--include PATTERN Quantize the layers" in text


@pytest.mark.parametrize(
    "command",
    [
        "quantize",
        "sample",
        "audit",
        "bench",
        "evaluate",
        "export",
        "report",
        "study",
        "trajectory",
        "analytic",
    ],
)
def test_threads_may_be_limited_everywhere(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert "--threads" in run(capsys, command, "--help")[1]


def test_quantize_prints_json_and_writes_a_quarter(model: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "q"
    arguments = ["--samples", "4", "--steps", "2", "--std", "sqrt", "--exclude", "mid_block.*", "--json"]
    arguments += ["--output-correction", "--timestep-groups", "2"]
    code, printed, err = run(capsys, "quantize", model, "--out", out, *arguments)
    assert code == 0, err
    figures = json.loads(printed)
    assert (
        0.25 < figures["size_ratio"] == round(figures["bytes"] / figures["float32_bytes"], 4) < 0.5
    )  # mid_block: fp32
    config = json.loads((out / "unet/config.json").read_text())["quantization_config"]
    names = [name for group in config["layers"] for name in group["names"]]
    floats = [group["names"] for group in config["layers"] if group["activations"]["bits"] == 32]
    assert figures["float_activations"] == sum(map(len, floats)) > 0
    assert len(names) == figures["quantized_layers"] and not any(
        name.startswith("mid_block") for name in names
    )
    assert config["recipe"]["timesteps"]["std"] == "sqrt"
    assert config["recipe"]["output_correction"] is True
    assert config["recipe"]["timestep_groups"] == 2
    assert config["calibration"]["timestep_groups"]["groups"] == 1  # 4 pairs are too few for two


def test_quantize_writes_groups_where_weights_have_4_bits(model: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    quick = ("--samples", "2", "--steps", "2", "--recipe", "ptq4dm", "--group-size", "16")
    code, out, err = run(capsys, "quantize", model, "--out", tmp_path / "q", *quick)
    assert code == 2 and not out and len(err.splitlines()) == 1, err
    assert "--group-size: no layer has weights of at most 4 bits; give --weights 4" in err
    code, _, err = run(capsys, "quantize", model, "--out", tmp_path / "q", *quick, "--weights", "4")
    assert code == 0, err
    config = json.loads((tmp_path / "q/unet/config.json").read_text())["quantization_config"]
    assert [group["weights"]["group_size"] for group in config["layers"]] == [16]
    code, _, err = run(capsys, "quantize", model, "--out", tmp_path / "p", *quick, "--group-size", "1")
    assert code == 2 and "group_size: 1 is not a whole number from 2" in err


@pytest.mark.parametrize("has_vnni", [False, True])
def test_quantize_tells_where_a_pair_limit_pays(  # type: ignore[no-untyped-def]
    model: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, has_vnni: bool
) -> None:
    """In a line, on CPUs whose kernels add in 16 bits, of 8-bit weights without one."""
    monkeypatch.setattr(saturation, "adds_in_16_bits", lambda: not has_vnni)
    quick = (
        "quantize",
        model,
        "--samples",
        "2",
        "--steps",
        "2",
        "--recipe",
        "ptq4dm",
        "--out",
        tmp_path / "q",
    )
    told = []
    for more in ([], ["--pair-limit"], ["--weights", "7"]):
        code, _, err = run(capsys, *quick, *more)
        assert code == 0, err
        told.append("with --pair-limit they take one" in err)
        config = json.loads((tmp_path / "q/unet/config.json").read_text())["quantization_config"]
        assert {group["weights"].get("pair_limit", False) for group in config["layers"]} == {
            "--pair-limit" in more
        }
    assert told == [not has_vnni, False, False]


@pytest.mark.parametrize("runtime", ["openvino", "torch"])
def test_sample_writes_arrays_grids_and_folders(int8: Path, tmp_path: Path, capsys, runtime: str) -> None:  # type: ignore[no-untyped-def]
    common = ("sample", int8, "--num-images", "3", "--steps", "2", "--runtime", runtime, "--precision", "f32")
    assert run(capsys, *common, "--out", tmp_path / "a.npz")[0] == 0
    array = np.load(tmp_path / "a.npz")["arr_0"]
    assert array.shape == (3, 8, 8, 3) and array.dtype == np.uint8
    assert run(capsys, *common, "--out", tmp_path / "folder")[0] == 0
    pictures = [pixels(path) for path in sorted((tmp_path / "folder").glob("*.png"))]
    assert np.array_equal(np.stack(pictures), array)
    assert run(capsys, *common, "--out", tmp_path / "grid.png")[0] == 0
    assert pixels(tmp_path / "grid.png").shape[1] > 2 * 8


def test_image_k_depends_on_its_seed_alone(int8: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    common = ("sample", int8, "--steps", "2", "--runtime", "torch", "--num-images")
    run(capsys, *common, "3", "--seed", "5", "--out", tmp_path / "a.npz")
    run(capsys, *common, "1", "--seed", "7", "--out", tmp_path / "b.npz")
    a, b = (np.load(tmp_path / name)["arr_0"].astype(int) for name in ("a.npz", "b.npz"))
    assert np.abs(a[2] - b[0]).max() <= 1  # kernels of another batch size may round the last bit differently


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["quantize", "MODEL", "--out", "OUT", "--weights", "9"], "weights"),
        (["quantize", "MODEL", "--out", "OUT", "--samples", "5000"], "samples"),
        (["quantize", "MODEL", "--out", "OUT", "--metric", "l7"], "metric"),
        (["quantize", "MODEL", "--out", "OUT", "--std", "wide"], "--std"),
        (["quantize", "MODEL", "--out", "OUT", "--exclude", "nothing*"], "--exclude: 'nothing*'"),
        (["quantize", "MODEL", "--out", "OUT", "--include", "nothing*"], "tiny lists their names"),
        (["quantize", "MODEL"], "--out"),
        (["quantize", "MODEL"], "(see octavo quantize --help)"),
        (["quantize", "MODEL", "--out"], "(see octavo quantize --help)"),
        (["quantize", "INT8", "--out", "OUT"], "tiny-int8: its unet is quantized already"),
        (["sample", "NOWHERE", "--out", "a.png"], "nowhere"),
        (["sample", "MODEL", "--out", "a.jpg", "--steps", "1", "--runtime", "torch"], "a.jpg"),
        (["sample", "MODEL", "--out", "a.png", "--prompt", "a cat"], "prompt"),
        (["audit", "MODEL"], "no quantized layers"),
        (["audit", "MODEL", "--class-labels", "three"], "--class-labels"),
        (["quantize", "MODEL", "--out", "MODEL"], "the model itself"),
        (["quantize", "MODEL", "--out", "."], "folder you are in"),
        (["sample", "MODEL", "--out", "a.png", "--steps", "2000", "--runtime", "torch"], "steps: 2,000"),
        (
            ["reuse", "INT8", "--out", "OUT", "--steps", "4", "--runtime", "torch-cuda"],
            "torch-cuda does not reuse",
        ),
        (["sample", "MODEL", "--out", "/dev/null/a.png"], "/dev/null"),
        (["demo", "--out", "/dev/null/x"], "/dev/null"),
        (["sampel"], "sampel"),
        (["sampel"], "(see octavo --help)"),
    ],
)
def test_errors_are_one_line_and_exit_2(  # type: ignore[no-untyped-def]
    model: Path, int8: Path, tmp_path: Path, capsys, monkeypatch, arguments: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"MODEL": str(model), "INT8": str(int8), "OUT": str(tmp_path / "out"), "NOWHERE": "./nowhere"}
    code, _, err = run(capsys, *[places.get(argument, argument) for argument in arguments])
    assert code == 2
    assert told in err and len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir()), "nothing half-written is left"
    assert (model / "model_index.json").is_file()


def test_too_many_steps_are_told_before_anything_is_compiled(
    int8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo.runtimes.accelerate", lambda *args, **kwargs: pytest.fail("compiled"))
    code, _, err = run(capsys, "sample", int8, "--out", tmp_path / "a.png", "--steps", "2000")
    assert code == 2 and "steps: 2,000 is more than the 1,000" in err


def test_the_bare_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys)
    assert code == 0 and not err
    assert len(out.splitlines()) > 5 and all(command in out for command in COMMANDS)


def test_what_a_library_raises_is_one_line(  # type: ignore[no-untyped-def]
    saved: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*arguments: Any, **settings: Any) -> None:
        raise ValueError("by diffusers,\nin two lines")

    monkeypatch.setattr("octavo.evaluation.generate.generate", told)
    code, _, err = run(capsys, "sample", saved, "--out", tmp_path / "a.png", "--runtime", "torch")
    assert code == 2 and err.startswith("octavo: ValueError: by diffusers, (OCTAVO_DEBUG=1"), err
    assert len(err.splitlines()) == 1


def test_a_traceback_is_for_those_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_DEBUG", "1")
    with pytest.raises(OctavoError, match="nowhere"):
        main(["audit", "./nowhere"])


@pytest.mark.parametrize(("command", "resumes"), [("quantize", True), ("audit", False)])
def test_only_quantize_promises_to_go_on(  # type: ignore[no-untyped-def]
    capsys, monkeypatch: pytest.MonkeyPatch, command: str, resumes: bool
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    for how in (interrupted, lambda *_, **__: 130):  # typer's own way, where it was it that caught Ctrl-C
        monkeypatch.setattr("octavo.cli.app", how)
        code, _, err = run(capsys, command, "digits")
        assert code == 130 and ("goes on" in err) == resumes and "interrupted" in err


def test_photos_are_kept_and_nothing_is_sampled_for_them(
    int8: Path, tmp_path: Path, capsys, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mum.png").write_text("mum")
    monkeypatch.setattr("octavo.evaluation.generate.generate", None)
    code, _, err = run(capsys, "sample", int8, "--out", tmp_path / "photos")
    assert code == 2 and "mum.png" in err
    assert (tmp_path / "photos" / "mum.png").read_text() == "mum"


def test_class_labels_choose_the_images(dit, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    dit.save_pretrained(tmp_path / "dit")
    arrays = []
    for labels in ("1,5", "1,7"):
        out = tmp_path / f"{labels}.npz"
        code, _, err = run(
            capsys,
            *("sample", tmp_path / "dit", "--out", out, "--class-labels", labels, "--num-images", "2"),
            *("--steps", "2", "--runtime", "torch"),
        )
        assert code == 0, err
        arrays.append(np.load(out)["arr_0"])
    assert np.array_equal(arrays[0][0], arrays[1][0])
    assert not np.array_equal(arrays[0][1], arrays[1][1])


def test_the_demo_for_real_but_small(tmp_path: Path, capsys, caplog) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "demo"
    arguments = ("--samples", "4", "--steps", "2", "--num-images", "4")
    code, printed, err = run(capsys, "demo", "--out", out, *arguments)
    assert code == 0, err
    figures = json.loads((out / "figures.json").read_text())
    assert figures["size_ratio"] <= 0.27 and figures["psnr_db"] > 15 and figures["speedup"] > 0
    assert set(figures["images_per_second"]) == {"torch fp32", "octavo int8"}
    assert figures["recipe"] == ("best --pair-limit" if adds_in_16_bits() else "best")
    assert f"recipe  {figures['recipe']}" in printed and "two integer kernels" not in caplog.text
    in_int8, of, layers = figures["layers_in_int8"].split()
    assert of == "of" and in_int8 == layers and int(layers) > 10
    assert pixels(out / "fp32-and-int8.png").shape[1] > 2 * 2 * 64
    assert figures["picture"] in printed and figures["model"] in printed and figures["report"] in printed
    assert figures["report"] == str(out / "report.html") and (out / "report.html").stat().st_size < 5_000_000
    assert len(octavo.audit(octavo.load(figures["model"]))) == int(layers)


def test_attentions_products_are_an_option_and_audited(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "attentive"
    few = ("--recipe", "ptq4dm", "--weights", "7", "--samples", "2", "--steps", "2", "--attention-matmuls")
    assert run(capsys, "quantize", str(model), "--out", str(out), *few)[0] == 0
    code, text, _ = run(capsys, "audit", str(out), "--precision", "f32", "--threads", "1", "--json")
    rows = {row["layer"]: row for row in json.loads(text)["layers"]}
    assert code == 0 and rows["mid_block.attentions.0.qk"]["ok"] and rows["mid_block.attentions.0.pv"]["ok"]


def test_version_and_help_import_no_network_library(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"octavo {octavo.__version__}\n", "")
    code = (
        "import sys, octavo.cli.app; print([m for m in ('torch', 'diffusers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr

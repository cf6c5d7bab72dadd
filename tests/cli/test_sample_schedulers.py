"""`octavo sample --scheduler`, with every solver that it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from diffusers import DDPMPipeline, DDPMScheduler
from typer.testing import CliRunner

import octavo
from octavo.cli import app
from octavo.diffusion import call_pipeline, generators
from octavo.diffusion.samplers import ADAPTIVE, SOLVERS, with_scheduler
from octavo.evaluation.generate import SOLVING, to_uint8

# diffusers' solvers, with NumPy 2
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def model(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("schedulers") / "tiny"
    pipeline.save_pretrained(folder)
    return folder


def test_the_help_names_every_solver() -> None:
    text = CliRunner().invoke(app, ["sample", "--help"]).output
    words = set(text.replace(",", " ").split())
    assert {*SOLVERS, *ADAPTIVE} <= words and set(ADAPTIVE) == set(SOLVING)


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_every_solver_samples_what_it_does_in_python(
    model: Path, tmp_path: Path, capsys: Any, name: str
) -> None:
    common = (
        "--num-images",
        "2",
        "--steps",
        "4",
        "--runtime",
        "torch",
        "--json",
        "--out",
        tmp_path / "a.npz",
    )
    code, printed, err = run(capsys, "sample", model, "--scheduler", name, *common)
    assert code == 0, err
    by_hand = call_pipeline(
        with_scheduler(octavo.load(model), name), generators=generators(0, 0, 2), num_inference_steps=4
    )
    array = np.load(tmp_path / "a.npz")["arr_0"].astype(int)
    assert np.abs(array - to_uint8(by_hand)).max() <= 1 and array.std() > 1
    figures = json.loads(printed)
    assert figures["scheduler"].startswith(SOLVERS[name][0].removesuffix("Scheduler"))


@pytest.mark.parametrize(
    ("runtime", "name"), [("torch", "rk45"), ("torch", "adaptive"), ("openvino", "rk45")]
)
def test_solvers_that_choose_their_steps_report_their_evaluations(
    saved: Path, tmp_path: Path, capsys: Any, runtime: str, name: str
) -> None:
    """On a quantized model, on both runtimes."""
    common = (
        "--scheduler",
        name,
        "--rtol",
        "0.5",
        "--atol",
        "0.5",
        "--runtime",
        runtime,
        "--precision",
        "f32",
    )
    code, printed, err = run(
        capsys, "sample", saved, *common, "--num-images", "2", "--out", tmp_path / "a.npz", "--json"
    )
    assert code == 0, err
    figures = json.loads(printed)
    assert figures["scheduler"] == name and len(figures["evaluations"]) == 2 and "steps" not in figures
    assert np.load(tmp_path / "a.npz")["arr_0"].shape == (2, 8, 8, 3)
    if runtime == "openvino":
        return
    # image 1 alone
    code, text, err = run(
        capsys, "sample", saved, *common, "--num-images", "1", "--seed", "1", "--out", tmp_path / "b.npz"
    )
    assert code == 0 and f"{name}, {figures['evaluations'][1]:.1f} evaluations" in text, err
    a, b = (np.load(tmp_path / file)["arr_0"].astype(int) for file in ("a.npz", "b.npz"))
    assert np.array_equal(a[1], b[0])


def test_a_solver_on_a_trajectory(model: Path, tmp_path: Path, capsys: Any) -> None:
    octavo.Trajectory((900, 400, 100), 1000, "epsilon", "by hand").save(tmp_path / "three.json")
    common = ("--trajectory", tmp_path / "three.json", "--num-images", "1", "--runtime", "torch")
    code, out, err = run(
        capsys, "sample", model, "--scheduler", "heun", *common, "--out", tmp_path / "a.png", "--json"
    )
    assert code == 0, err
    figures = json.loads(out)
    assert figures["scheduler"] == "HeunDiscreteUnconditionalTrajectoryScheduler" and figures["steps"] == 3


def test_eta_is_ddims_in_both_commands(model: Path, tmp_path: Path, capsys: Any) -> None:
    """Under a DDPMPipeline too, whose call takes none."""
    by_ddpm = tmp_path / "ddpm"
    DDPMPipeline(octavo.load(model).unet, DDPMScheduler()).save_pretrained(by_ddpm)
    common = ("--scheduler", "ddim", "--runtime", "torch", "--steps", "3", "--eta", "0.5")
    arrays = []
    for name in (model, by_ddpm):
        code, _, err = run(capsys, "sample", name, *common, "--num-images", "2", "--out", tmp_path / "a.npz")
        assert code == 0, err
        arrays.append(np.load(tmp_path / "a.npz")["arr_0"])
    by_hand = call_pipeline(
        octavo.load(model), generators=generators(0, 0, 2), num_inference_steps=3, inputs={"eta": 0.5}
    )
    assert np.array_equal(*arrays) and np.abs(arrays[0].astype(int) - to_uint8(by_hand)).max() <= 1
    evaluate = ("--reference", by_ddpm, "--num-images", "8", "--features", "digits", "--no-cost", "--json")
    code, printed, err = run(capsys, "evaluate", by_ddpm, *common, *evaluate)
    assert code == 0, err
    assert json.loads(printed)["inputs"] == {"eta": 0.5}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--scheduler", "heunn"), "scheduler: 'heunn' is neither ddim,"),
        (("--scheduler", "pndm", "--steps", "3"), "num_inference_steps: PNDM begins with 4 steps"),
        (("--scheduler", "rk45", "--steps", "5"), "--steps: rk45 chooses its steps itself"),
        (("--scheduler", "adaptive", "--trajectory", "t.json"), "--trajectory: adaptive chooses its steps"),
        (("--scheduler", "rk45", "--rtol", "0"), "rtol: 0.0 is not above 0"),
        (("--scheduler", "rk45", "--eta", "0.5"), "--eta: rk45 chooses its steps itself"),
        (("--scheduler", "heun", "--eta", "0.5"), "eta (--eta): is DDIM's, and HeunDiscrete"),
        (("--input", "eta=5"), "inputs: eta (--eta): 5 is not a number from 0 to 1"),
        (("--input", "eta=0.5", "--eta", "0.5"), "--eta: --input eta is given too"),
        (("--scheduler", "heun", "--rtol", "0.1"), "--rtol: is for --scheduler rk45 and adaptive"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    model: Path, tmp_path: Path, capsys: Any, arguments: tuple[str, ...], told: str
) -> None:
    out, file = tmp_path / "a.png", tmp_path / "t.json"
    file.write_text("{}")
    given = [file if argument == file.name else argument for argument in arguments]
    code, printed, err = run(
        capsys, "sample", model, "--out", out, "--runtime", "torch", "--num-images", "1", *given
    )
    assert code == 2 and not printed and told in err and len(err.splitlines()) == 1, err
    assert not out.exists()


def test_other_commands_point_to_sample(model: Path, tmp_path: Path, capsys: Any) -> None:
    code, _, err = run(
        capsys, "trajectory", model, "--steps", "3", "--scheduler", "rk45", "--out", tmp_path / "t.json"
    )
    assert code == 2 and "rk45 chooses its steps itself" in err and "octavo sample" in err

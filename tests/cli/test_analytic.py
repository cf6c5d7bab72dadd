"""`octavo analytic`, and what samples from the folder that it writes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from diffusers import DDPMPipeline, DiffusionPipeline

import octavo
from octavo.diffusion import call_pipeline, generators
from octavo.diffusion.analytic import Gamma, estimate_gamma
from octavo.fingerprint import fingerprint, same_model
from octavo.quantization import quantized_layers

QUICK = ("--candidates", "3", "--num-images", "8", "--batch-size", "8")


@pytest.fixture(scope="module")
def model(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("analytic") / "tiny"
    pipeline.save_pretrained(folder)
    return folder


def test_a_folder_is_written_that_plain_diffusers_samples(
    model: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "analytic", model, "--out", "my analytic", *QUICK)
    assert code == 0, err
    assert "gamma: at most 432 evaluations of the network" in err and "432 evaluations" in out
    code, again, err = run(capsys, "analytic", model, "--out", "again", *QUICK)
    assert code == 0 and "432 evaluations of the network, 432 of them kept from an earlier run" in again, err
    assert "kept" not in out
    loaded = DiffusionPipeline.from_pretrained("my analytic")
    assert type(loaded) is DDPMPipeline and type(loaded.scheduler).__name__ == "AnalyticScheduler"
    config = loaded.scheduler.config
    assert config.kind == "ddpm" and config.gamma_timesteps == [0, 500, 999]
    (line,) = (line for line in out.splitlines() if line.startswith("next: "))
    _, *command = shlex.split(line.removeprefix("next: "))
    code, _, err = run(capsys, *command, "--num-images", "1", "--runtime", "torch")
    assert code == 0 and Path("grid.png").is_file(), err
    # what diffusers alone samples is what the command samples
    sample = ("sample", "my analytic", "--steps", "3", "--runtime", "torch", "--num-images", "2")
    assert run(capsys, *sample, "--out", "a.npz")[0] == 0
    images = call_pipeline(loaded, generators=generators(0, 0, 2), num_inference_steps=3)
    array = np.load("a.npz")["arr_0"]
    assert np.abs(array - np.asarray(images) * 255).max() < 1.01


def test_a_quantized_model_stays_quantized_and_has_its_own_gamma(
    saved: Path, model: Path, tmp_path: Path, capsys: Any
) -> None:
    arguments = (*QUICK, "--kind", "ddim", "--runtime", "torch", "--json")
    code, printed, err = run(capsys, "analytic", saved, "--out", tmp_path / "int8", *arguments)
    assert code == 0, err
    figures = json.loads(printed)
    gamma = Gamma.from_dict(figures["gamma"])
    quantized = octavo.load(saved)
    assert gamma.network == fingerprint(quantized.unet)
    loaded = octavo.load(tmp_path / "int8")
    before, after = (dict(quantized_layers(p.unet)) for p in (quantized, loaded))
    assert before and before.keys() == after.keys()
    assert all(bool((after[name].weight_int8 == layer.weight_int8).all()) for name, layer in before.items())
    assert loaded.scheduler.config.gamma == list(gamma.values) and loaded.scheduler.config.kind == "ddim"
    own = estimate_gamma(octavo.load(model), candidates=3, images=8, batch_size=8, progress=False)
    assert same_model(own.model, gamma.model) and own.values != gamma.values


def test_own_timesteps_and_a_trajectory_are_visited(model: Path, tmp_path: Path, capsys: Any) -> None:
    common = ("analytic", model, *QUICK, "--runtime", "torch", "--json", "--out")
    code, printed, err = run(capsys, *common, tmp_path / "a", "--own-timesteps", "2")
    assert code == 0, err
    assert json.loads(printed)["trajectory"] == [999, 0]
    assert octavo.load(tmp_path / "a").scheduler.config.trajectory == [999, 0]
    file = tmp_path / "three.json"
    octavo.Trajectory((900, 400, 100), 1000, "epsilon", "by hand").save(file)
    code, printed, err = run(capsys, *common, tmp_path / "b", "--trajectory", file)
    assert code == 0, err
    assert octavo.load(tmp_path / "b").scheduler.config.trajectory == [900, 400, 100]
    assert json.loads(printed)["scheduler"] == "AnalyticTrajectoryScheduler"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--kind", "sde"), "kind: 'sde' is not one of ddpm, ddim"),
        (("--own-timesteps", "4", "--candidates", "3"), "--own-timesteps: 4 is more than the 3 candidates"),
        (("--own-timesteps", "2", "--trajectory", "t.json"), "--own-timesteps: --trajectory names others"),
        (("--candidates", "2000"), "candidates: 2000 is not a whole number from 2 to 1000"),
        (("--trajectory", "absent.json"), "absent.json: cannot be read"),
        (("--seed", "2000000000"), "seed: 2000000000 is not a whole number from 0 to 107374"),
        (("--eta", "0.5"), "--eta: the optimal variances take its place"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    arguments: tuple[str, ...], told: str, model: Path, tmp_path: Path, capsys: Any
) -> None:
    file = tmp_path / "t.json"
    file.write_text("{}")
    given = [file if argument == file.name else argument for argument in arguments]
    code, printed, err = run(capsys, "analytic", model, "--out", tmp_path / "out", *given)
    assert code == 2 and not printed and told in err and len(err.splitlines()) == 1, err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_things_and_the_model_itself_are_kept(
    model: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "note.txt").write_text("mine")
    code, _, err = run(capsys, "analytic", model, "--out", tmp_path, *QUICK)
    assert code == 2 and "holds other things" in err
    code, _, err = run(capsys, "analytic", model, "--out", model, *QUICK)
    assert code == 2 and "is the model itself" in err

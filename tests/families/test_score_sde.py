"""A score SDE whose variance explodes, by diffusers' own pipeline and scheduler, through the whole path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from diffusers import DiffusionPipeline, ScoreSdeVeScheduler
from tiny import tiny_exploding_pipeline

import octavo
from octavo.evaluation.generate import generate
from octavo.quantization import quantized_layers

STEPS = 5


@pytest.fixture(scope="module")
def exploding() -> Any:
    return tiny_exploding_pipeline()


@pytest.fixture(scope="module")
def folder(exploding: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = octavo.PTQ4DM(samples=4, steps=STEPS, output_correction=True)
    quantized = octavo.quantize(exploding, recipe, batch_size=4, progress=False)
    place = tmp_path_factory.mktemp("exploding") / "int8"
    quantized.save_pretrained(place)
    return place


def test_it_is_quantized_saved_loaded_run_in_int8_and_audited(folder: Path, exploding: Any) -> None:
    loaded: Any = DiffusionPipeline.from_pretrained(folder)
    assert type(loaded) is type(exploding) and type(loaded.scheduler) is ScoreSdeVeScheduler
    loaded.set_progress_bar_config(disable=True)
    fast = octavo.accelerate(loaded, precision="f32", batch_size=2)
    rows = octavo.audit(fast)
    assert len(rows) == len([*quantized_layers(loaded.unet)]) > 15 and all(row.ok for row in rows)
    exact, simulated, executed = (
        generate(pipeline, 2, steps=STEPS, batch_size=2, progress=False)
        for pipeline in (exploding, loaded, fast)
    )
    assert 0 < np.abs(simulated - exact).mean() < 0.05
    assert np.abs(executed - simulated).mean() < np.abs(simulated - exact).mean()


def test_the_commands(folder: Path, exploding: Any, tmp_path: Path, capsys: Any) -> None:
    exploding.save_pretrained(tmp_path / "float")
    models = (str(folder), "--reference", str(tmp_path / "float"))
    given = ("--steps", str(STEPS), "--num-images", "8", "--batch-size", "8", "--runtime", "torch")
    code, printed, err = run(
        capsys, "evaluate", *models, *given, "--features", "digits", "--no-cost", "--json"
    )
    assert code == 0, err
    figures = json.loads(printed)
    assert figures["scheduler"] == "ScoreSdeVeScheduler"
    code, printed, err = run(capsys, "sample", str(folder), *given, "--out", str(tmp_path / "a.png"))
    assert code == 0 and (tmp_path / "a.png").is_file(), err
    for arguments in (
        ("trajectory", str(folder), "--steps", "3", "--out", str(tmp_path / "t.json")),
        (
            "sample",
            str(folder),
            "--scheduler",
            "rk45",
            "--out",
            str(tmp_path / "b.png"),
            "--runtime",
            "torch",
        ),
    ):
        code, _, err = run(capsys, *arguments)
        assert code == 2 and "ScoreSdeVeScheduler has no alpha-bars" in err and len(err.splitlines()) == 1

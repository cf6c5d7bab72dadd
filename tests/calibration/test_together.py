"""A calibration shared by processes is the one that a single process makes, bit for bit."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import octavo
from octavo.calibration.job import job_name, job_path
from octavo.calibration.observations import STATE_FILE
from octavo.calibration.together import prepare_together
from octavo.errors import OctavoError
from octavo.processes import Processes
from octavo.work import held


@dataclass(frozen=True)
class Apart(Processes):
    """One of several processes, run after each other: nobody is waited for."""

    def wait(self) -> None: ...

    def agree(self, values: Sequence[int]) -> list[int]:
        return list(values)


def _prepared(pipeline: Any, recipe: octavo.PTQ4DM, workdir: Path, count: int) -> Path:
    for rank in reversed(range(count)):
        prepare_together(pipeline, recipe, Apart(rank, count), batch_size=2, workdir=workdir, progress=False)
    return job_path(workdir, job_name(pipeline, recipe, 0, 2, None))


def _state(quantized: Any) -> dict[str, torch.Tensor]:
    return dict(quantized.unet.state_dict())


@pytest.mark.parametrize("count", [2, 3])
def test_the_same_model_as_by_one_process(
    pipeline: Any, recipe: octavo.PTQ4DM, tmp_path: Path, count: int
) -> None:
    alone = octavo.quantize(pipeline, recipe, batch_size=2, workdir=tmp_path / "alone", progress=False)
    folder = _prepared(pipeline, recipe, tmp_path, count)
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert STATE_FILE in written and not [name for name in written if "-of-" in name]
    shared = octavo.quantize(pipeline, recipe, batch_size=2, workdir=tmp_path, progress=False)
    expected, found = _state(alone), _state(shared)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not folder.exists()


def test_each_process_makes_its_share(pipeline: Any, recipe: octavo.PTQ4DM, tmp_path: Path) -> None:
    prepare_together(pipeline, recipe, Apart(1, 2), batch_size=2, workdir=tmp_path, progress=False)
    folder = job_path(tmp_path, job_name(pipeline, recipe, 0, 2, None))
    own = {path.name for path in folder.glob("*.safetensors")}
    assert "observers-1-of-2.safetensors" in own and len(own) == 1 + 3  # of 6 batches of pairs


def test_another_run_on_the_same_job_is_told(pipeline: Any, recipe: octavo.PTQ4DM, tmp_path: Path) -> None:
    folder = job_path(tmp_path, job_name(pipeline, recipe, 0, 2, None))
    folder.mkdir(parents=True)
    with held(folder, "ours"), pytest.raises(OctavoError, match="another process is calibrating the same"):
        prepare_together(pipeline, recipe, Apart(0, 2), batch_size=2, workdir=tmp_path, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": float("nan")}, "unet: mid_block.resnets.0.conv1.weight: holds NaN or infinity"),
        ({"components": ("unet", "vae")}, "components: 'vae' is none that Octavo quantizes"),
        ({"learned_variance": True}, "learned_variance"),
        ({"batch_size": 0}, "batch_size: 0 is not a whole number from 1"),
    ],
)
def test_what_cannot_be_calibrated_is_told_before_anything_is_collected(
    make_pipeline: Any, recipe: octavo.PTQ4DM, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    pipeline = make_pipeline()
    if "weight" in change:
        pipeline.unet.mid_block.resnets[0].conv1.weight.data.view(-1)[3] = change.pop("weight")
    if "learned_variance" in change:
        recipe = dataclasses.replace(recipe, **change)
        change = {}
    with pytest.raises(OctavoError, match=message):
        prepare_together(pipeline, recipe, Apart(0, 2), workdir=tmp_path, progress=False, **change)
    assert not any(tmp_path.iterdir())


def test_octavo_quantize_under_a_launcher(pipeline: Any, tmp_path: Path) -> None:
    """`--multi_gpu` is how accelerate starts several processes on one machine; without GPUs they run on the CPU."""
    model = tmp_path / "model"
    pipeline.save_pretrained(model)
    accelerate = shutil.which("accelerate", path=str(Path(sys.executable).parent))
    assert accelerate
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    quantize = [
        "--module",
        "octavo",
        "quantize",
        str(model),
        "--samples",
        "8",
        "--steps",
        "3",
        "--batch-size",
        "1",
    ]
    runs = []
    for count in (1, 2):
        several = ["--multi_gpu", "--main_process_port", "0"] if count > 1 else ["--cpu"]
        command = [accelerate, "launch", *several, "--num_processes", str(count), "--num_machines", "1"]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no", *quantize]
        environment = {**environment, "OCTAVO_CACHE": str(tmp_path / f"cache{count}")}
        runs.append(
            subprocess.Popen(
                [*command, "--out", str(tmp_path / str(count))],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [run.communicate() for run in runs]
    for run, (out, err) in zip(runs, outputs, strict=True):
        assert run.returncode == 0, err
        assert out.count("quantized layers") == 1  # the first process prints
    alone, together = (
        load_file(tmp_path / str(count) / "unet" / "diffusion_pytorch_model.safetensors") for count in (1, 2)
    )
    assert alone.keys() == together.keys()
    assert all(torch.equal(together[name], tensor) for name, tensor in alone.items())

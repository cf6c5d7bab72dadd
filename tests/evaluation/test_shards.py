"""Generation in shards: the same bits after a kill, for other counts, and for 1 or 2 processes under a launcher."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import octavo
from octavo.diffusion import with_denoiser
from octavo.errors import OctavoError
from octavo.evaluation.generate import generate, to_uint8
from octavo.evaluation.shards import LEVELS, ShardStore, generate_shards, job_name
from octavo.processes import Processes
from octavo.runtimes.core import openvino_core
from octavo.runtimes.precision import has_bf16
from octavo.work import held

SCRIPT = """
import os, signal, sys
import torch
import octavo
from octavo.evaluation import shards
from octavo.processes import join_processes, leave_processes

torch.set_num_threads(1)
model, workdir, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
written, save_file = [], shards.save_file

def save_or_die(tensors, path):
    save_file(tensors, path)
    written.append(path)
    if len(written) == kill_at:
        with open(path, "r+b") as file:  # half a file, at the place where it is written
            file.truncate(os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

shards.save_file = save_or_die
processes = join_processes()
shards.generate_shards(
    octavo.load(model), 7, steps=2, batch_size=2, workdir=workdir, processes=processes, progress=False
)
print(f"process {processes.rank} of {processes.count} wrote {len(written)}")
leave_processes()
"""


@pytest.fixture(scope="module")
def tiny(pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("shards") / "tiny"
    pipeline.save_pretrained(folder)
    (folder.parent / "script.py").write_text(SCRIPT)
    return folder


@pytest.fixture
def one_thread():  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(pipeline, workdir: Path, num_images: int = 7) -> ShardStore:  # type: ignore[no-untyped-def]
    return generate_shards(pipeline, num_images, steps=2, batch_size=2, workdir=workdir, progress=False)


def contents(store: ShardStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.folder.glob("*.safetensors")}


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*/*.safetensors")}


def test_shards_are_the_images_of_generate(pipeline, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    images = make(pipeline, tmp_path).images()
    assert images.shape == (7, 8, 8, 3) and images.dtype == np.float32
    in_memory = generate(pipeline, 8, steps=2, batch_size=2, progress=False)[:7]
    assert np.abs(images - in_memory).max() <= 0.51 / LEVELS
    assert np.array_equal(to_uint8(images), to_uint8(in_memory))


def test_sixteen_bits_round_further_to_the_right_eight(tmp_path: Path) -> None:
    borders = (np.arange(255) + 0.5) / 255
    near = np.concatenate([borders - 1e-5, borders + 1e-5, np.random.default_rng(0).random(1000), [0, 1]])
    images = near.astype(np.float32).reshape(1, 1, -1, 1)
    store = ShardStore(tmp_path, 1, 1)
    store.save(0, images)
    assert np.array_equal(to_uint8(store.images()), to_uint8(images))


def test_only_what_is_missing_is_made_again(pipeline, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    store = make(pipeline, tmp_path)
    whole, before = contents(store), stamps(tmp_path)
    store.path(2).unlink()
    assert contents(make(pipeline, tmp_path)) == whole
    after = stamps(tmp_path)
    assert [name for name in before if before[name] != after[name]] == [store.path(2).name]


def test_more_images_begin_with_the_same_bits(pipeline, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    few = make(pipeline, tmp_path, 3)
    images, before = few.images(), stamps(tmp_path)
    more = make(pipeline, tmp_path, 6)
    assert more.folder == few.folder and len(more) == 3
    assert np.array_equal(more.images()[:3], images)
    assert {name: stamps(tmp_path)[name] for name in before} == before


def test_the_folder_is_named_by_all_that_decides_the_bits(  # type: ignore[no-untyped-def]
    pipeline, quantized, make_pipeline: Callable[..., object]
) -> None:
    base = {"steps": 2, "seed": 0, "batch_size": 2, "inputs": {}}
    other_clipping = with_denoiser(pipeline, "unet", pipeline.unet)
    other_clipping.scheduler.register_to_config(clip_sample_range=2.0)
    names = [
        job_name(pipeline, **base),
        *(
            job_name(pipeline, **{**base, **change})
            for change in ({"steps": 3}, {"seed": 1}, {"batch_size": 3}, {"inputs": {"eta": 1.0}})
        ),
        job_name(make_pipeline(seed=1), **base),
        job_name(quantized, **base),
        job_name(other_clipping, **base),
        *(
            job_name(octavo.accelerate(quantized, precision=precision, threads=threads, batch_size=2), **base)
            for precision, threads in (("f32", 1), ("f32", 2), *[("bf16", 1)] * has_bf16(openvino_core()))
        ),
    ]
    assert len(set(names)) == len(names)
    assert job_name(make_pipeline(), **base) == names[0]
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    assert job_name(pipeline, **base) not in names
    torch.set_num_threads(before)


def test_two_runs_do_not_make_the_same_images(pipeline, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    store = make(pipeline, tmp_path, 2)
    with held(store.folder, "test"):
        with pytest.raises(OctavoError, match="another run"):
            make(pipeline, tmp_path, 2)
        store.remove()
        assert store.has(0)
    store.remove()
    assert not store.folder.exists()


def test_a_damaged_shard_is_named(pipeline, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    store = make(pipeline, tmp_path, 2)
    store.path(0).write_bytes(store.path(0).read_bytes()[:-10])
    with pytest.raises(OctavoError, match=r"images-000000\.safetensors: not readable"):
        store.images()
    with pytest.raises(OctavoError, match="num_images: 0"):
        make(pipeline, tmp_path, 0)


def test_every_process_takes_its_share(pipeline, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Without a launcher: what process 1 of 3 would do, its waiting left out."""
    monkeypatch.setattr(Processes, "wait", lambda self: None)
    monkeypatch.setattr(Processes, "agree", lambda self, values: list(values))
    with pytest.raises(OctavoError, match="must see the same folder"):
        generate_shards(
            pipeline,
            9,
            steps=1,
            batch_size=2,
            workdir=tmp_path,
            processes=Processes(1, 3),
            progress=False,
        )
    assert sorted(stamps(tmp_path)) == ["images-000001.safetensors", "images-000004.safetensors"]


def test_images_are_told_as_they_are_made(pipeline, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    told: list[int] = []
    settings = {"steps": 1, "batch_size": 2, "workdir": tmp_path, "progress": False}
    for _ in range(2):  # the second time none is made
        generate_shards(pipeline, 3, on_images=told.append, **settings)
        assert told == [2, 2]


def test_a_killed_run_goes_on_to_the_same_bits(tiny: Path, tmp_path: Path, one_thread) -> None:  # type: ignore[no-untyped-def]
    command = [sys.executable, str(tiny.parent / "script.py"), str(tiny), str(tmp_path / "work"), "3"]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = stamps(tmp_path / "work")
    assert sorted(before) == ["images-000000.safetensors", "images-000001.safetensors"]

    pipeline = octavo.load(tiny)
    store = make(pipeline, tmp_path / "work")
    after = stamps(tmp_path / "work")
    assert {name: after[name] for name in before} == before, "whole shards are not made again"
    assert contents(store) == contents(make(pipeline, tmp_path / "fresh"))


def test_one_and_two_processes_under_accelerate_make_the_same_bits(tiny: Path, tmp_path: Path) -> None:
    """`--multi_gpu` is how accelerate starts several processes on one machine; without GPUs they run on the CPU."""
    accelerate = shutil.which("accelerate", path=str(Path(sys.executable).parent))
    assert accelerate, "accelerate is a requirement of octavo"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    runs = {}
    for count in (1, 2):
        several = ["--multi_gpu", "--main_process_port", "0"] if count > 1 else ["--cpu"]
        command = [accelerate, "launch", *several, "--num_processes", str(count), "--num_machines", "1"]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no", str(tiny.parent / "script.py")]
        command += [str(tiny), str(tmp_path / str(count)), "0"]
        runs[count] = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    outputs = {count: run.communicate() for count, run in runs.items()}
    for count, run in runs.items():
        assert run.returncode == 0, outputs[count][1]
    assert "process 0 of 1 wrote 4" in outputs[1][0]
    assert "process 0 of 2 wrote 2" in outputs[2][0] and "process 1 of 2 wrote 2" in outputs[2][0]
    alone, together = (
        {path.name: path.read_bytes() for path in (tmp_path / str(count)).rglob("*.safetensors")}
        for count in (1, 2)
    )
    assert len(alone) == 4 and alone == together

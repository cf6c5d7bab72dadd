# ruff: noqa: E501 (tables of values)
"""Kill -9 at random moments: each command starts again, or goes on, to the same bits, and no output is ever half there.

    python tests/support/kills.py --kills 50      # of each command

Each by the default recipe and the default runtime. A command runs in a forked child, so that it is killed at its work
and not at its imports. It is first run to its end, for its time and its result; then again and again in fresh places,
killed at random moments, looked at after each, and run to its end.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import random
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tiny import tiny_pipeline

import octavo
from octavo.calibration import second_order
from octavo.cli import main as octavo_command

FIGURES = "figures.json"


@dataclass(frozen=True)
class Job:
    """One command.

    `arguments`: without the output; `look`: what a reader finds there, whatever the moment; `most`: kills of one run,
    each within `share` of the command's own time after it was started again; `other`: arguments of another run, whose
    output is then replaced, None: a finished output is replaced by the same.
    """

    name: str
    arguments: tuple[str, ...]
    look: Callable[[Path], Any]
    most: int = 3
    share: float = 1.0
    other: tuple[str, ...] | None = None


def jobs(model: Path, int8: Path) -> list[Job]:
    few = ("--threads", "1", "--batch-size", "2")
    return [
        Job("quantize", ("quantize", str(model), "--samples", "8", "--steps", "3", *few, "--output-correction"), look_folder),
        Job("sample", ("sample", str(int8), "--num-images", "8", "--steps", "6", *few), look_folder),
        Job("evaluate", ("evaluate", str(int8), "--reference", str(model), "--num-images", "16", "--steps", "4",
                         "--no-cost", *few), look_evaluation, other=("--seed", "5")),
        Job("study", ("study", str(model), "--quick", "--table", "T2", "--seeds", "1", "--num-images", "8", "--steps", "2",
                      "--samples", "4", "--no-low-bits", *few), look_study, most=8, share=0.4),
    ]  # fmt: skip


def look_folder(out: Path) -> Any:
    """Everything in it; None where there is no folder."""
    if not out.exists():
        return None
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def look_evaluation(out: Path) -> Any:
    """The figures without their times, and the images beside them; None before there are figures."""
    if not (out / FIGURES).exists():
        return None
    figures = json.loads((out / FIGURES).read_text())
    del figures["seconds"]
    pixels = {name: np.load(out / name)["arr_0"].tobytes() for name in ("images.npz", "reference-images.npz")}
    return [figures, {name: hashlib.sha256(data).hexdigest() for name, data in pixels.items()}]


def look_study(out: Path) -> Any:
    """The cells without their times, once the study says that it is finished; every file must be whole at any time."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*.json")):
        if not any(part.startswith(".") for part in path.relative_to(out).parts):
            found[path.name] = json.loads(path.read_text())
    if not found.get("study.json", {}).get("finished") or not (out / "report.html").exists():
        return None
    return json.dumps(_timeless(found), sort_keys=True)


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _timeless(item) for key, item in value.items() if key not in ("seconds", "command", "made")
        }
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def start(job: Job, place: Path, *more: str) -> int:
    """The command in a child with `place` for its output and its cache; returns its process id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.environ["OCTAVO_CACHE"] = str(place / "cache")
        log = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        with contextlib.suppress(BaseException):
            try:
                octavo_command([*job.arguments, *more, "--out", str(place / "out")])
            except SystemExit as stop:
                code = int(stop.code or 0)
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)


def finish(job: Job, place: Path, *more: str) -> float:
    """Run the command to its end; returns its seconds. Raises `AssertionError` if it does not end well."""
    begin = time.perf_counter()
    _, status = os.waitpid(start(job, place, *more), 0)
    assert status == 0, f"{job.name} ended with {status}: {(place / 'log').read_text()[-600:]}"
    return time.perf_counter() - begin


def kill(job: Job, place: Path, after: float) -> bool:
    """Start the command and kill it `after` so many seconds; False if it had ended by then, and well."""
    process = start(job, place)
    time.sleep(after)
    ended, status = os.waitpid(process, os.WNOHANG)
    if ended:
        assert status == 0, f"{job.name} ended with {status}: {(place / 'log').read_text()[-600:]}"
        return False
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return True


def leftovers(place: Path) -> list[str]:
    """What is hidden or unfinished where the output is, and in the cache's own places."""
    return [str(path) for path in place.rglob("*.unfinished")]


def trial(
    job: Job, folder: Path, right: Any, seconds: float, rng: random.Random, most: int | None = None
) -> dict[str, Any]:
    """Kill a fresh run of the command up to `most` times, then let it end; raises `AssertionError` for what is wrong.

    Half of the trials replace a finished output (but of a study), which must be there whole at every moment; of an
    evaluation, whose output is three files, it is that of another run, or no figures are, which tell by their absence.
    """
    place = Path(tempfile.mkdtemp(prefix=f"{job.name}-", dir=folder))
    replaces = job.look is not look_study and rng.random() < 0.5
    allowed = [right, None]
    if replaces:
        finish(job, place, *(job.other or ()))
        before = job.look(place / "out")
        allowed = [right, before] if job.other is None else [right, before, None]
    killed = 0
    for _ in range(rng.randint(1, most or job.most)):
        killed += kill(job, place, rng.uniform(0, job.share * seconds))
        found = job.look(place / "out")
        assert found in allowed, f"{job.name}: {place} is half-written"
    again = finish(job, place)
    assert job.look(place / "out") == right, f"{job.name}: {place} has other bits"
    assert not leftovers(place), f"{job.name}: left {leftovers(place)}"
    return {"job": job.name, "killed": killed, "replaces": replaces, "seconds": round(again, 2)}


def prepare(folder: Path) -> list[Job]:
    """A tiny float model of 16 x 16 grey pixels, its int8 version, and the jobs on them."""
    for name in ("openvino", "octavo.evaluation", "octavo.report", "octavo.study"):
        importlib.import_module(name)  # here, so that no child spends its time on it
    second_order.MOMENT_BYTES = 2**20  # so that rounding takes several passes, as of large networks
    from diffusers.utils import logging
    from tqdm import tqdm

    tqdm.set_lock(
        threading.RLock()
    )  # its own is one for all forked children: one killed with it stopped the next
    logging.disable_progress_bar()
    pipeline = tiny_pipeline(size=16, channels=1, levels=1)
    pipeline.save_pretrained(folder / "model")
    recipe = octavo.named_recipe("best", samples=4, steps=2)
    octavo.quantize(pipeline, recipe, progress=False, workdir=folder / "work").save_pretrained(
        folder / "int8"
    )
    return jobs(folder / "model", folder / "int8")


def _many(job: Job, folder: Path, kills: int, rng: random.Random) -> str:
    """Trials of one command until it was killed so many times; raises `AssertionError` for what is wrong."""
    begin = time.perf_counter()
    place = Path(tempfile.mkdtemp(prefix=f"{job.name}-whole-", dir=folder))
    seconds = finish(job, place)
    right = job.look(place / "out")
    assert right is not None, f"{job.name} wrote nothing"
    print(f"{job.name}: {seconds:.1f} s undisturbed", flush=True)
    killed = runs = replaced = 0
    while killed < kills:
        said = trial(job, folder, right, seconds, rng)
        killed, runs, replaced = killed + said["killed"], runs + 1, replaced + said["replaces"]
        print(said, flush=True)
    return (
        f"{job.name}: {killed} kills in {runs} runs ({replaced} over a finished output), "
        f"{time.perf_counter() - begin:.0f} s: all went on to the same bits"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", nargs="*", default=["quantize", "sample", "evaluate", "study"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for job in prepare(folder):
            if job.name in arguments.jobs:
                print(_many(job, folder, arguments.kills, random.Random(arguments.seed)), flush=True)


if __name__ == "__main__":
    main()

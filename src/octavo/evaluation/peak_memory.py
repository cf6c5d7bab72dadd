"""Peak memory of sampling from a model, each in a fresh process: `python -m octavo.evaluation.peak_memory`."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from octavo.errors import OctavoError

STEPS = 2
PROC_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class MemoryJob:
    """What is loaded and how it is run; everything of it is JSON. `precision`: of what stays float.

    reuse     file of the plan by which deep features are reused, and with it the run that it was made for:
    steps     how many the pipeline is called with,
    scheduler and trajectory   name and file, None: the model's own.
    """

    model: str
    runtime: str = "torch"
    precision: str = "f32"
    threads: int = 1
    batch_size: int = 1
    inputs: dict[str, Any] = field(default_factory=dict)
    reuse: str | None = None
    steps: int = STEPS
    scheduler: str | None = None
    trajectory: str | None = None


def peak_memory(jobs: Sequence[MemoryJob]) -> list[tuple[int, int]]:
    """For each job bytes of resident memory: (peak, with the libraries alone), of a fresh process.

    The process loads the pipeline and samples one batch in two steps (in all of its trajectory or reuse plan, where it
    has one), which touches all memory that more steps would touch. The peak is the kernel's VmHWM, which starts from
    nothing in a new program (`ru_maxrss` does not: it starts from the parent's). The processes run side by side. Raises
    `OctavoError` where one fails, and for inputs that JSON does not hold (pictures).
    """
    command = [sys.executable, "-m", "octavo.evaluation.peak_memory"]
    try:
        told = [json.dumps(asdict(job)) for job in jobs]
    except TypeError as error:
        raise OctavoError(f"inputs: cannot be handed to another process ({error})") from error
    running = [
        subprocess.Popen([*command, text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for text in told
    ]
    outputs = [process.communicate() for process in running]
    found = []
    for job, process, (printed, errors) in zip(jobs, running, outputs, strict=True):
        lines = printed.strip().splitlines()
        if process.returncode or not lines:
            reason = (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            raise OctavoError(f"{job.model}: its memory could not be measured: {reason}")
        peak, libraries = json.loads(lines[-1])
        found.append((int(peak), int(libraries)))
    return found


def run(job: MemoryJob) -> tuple[int, int]:
    """Do the job in this process: (peak bytes, bytes before the model was loaded)."""
    import torch

    from octavo.checkpoint import load
    from octavo.diffusion.reuse import ReusePlan
    from octavo.diffusion.samplers import with_scheduler
    from octavo.diffusion.trajectories import Trajectory, steps_of, with_trajectory
    from octavo.evaluation.generate import sample
    from octavo.runtimes import accelerate, with_reuse

    torch.set_num_threads(job.threads)
    if job.runtime == "openvino":
        import openvino  # noqa: F401 - a library of this runtime
    if job.runtime == "onnx":
        import onnxruntime  # noqa: F401
    if job.runtime == "torch-cuda":
        import triton  # noqa: F401
    libraries = _memory("VmRSS")
    pipeline = load(job.model)
    pipeline.set_progress_bar_config(disable=True)
    if job.scheduler is not None:
        pipeline = with_scheduler(pipeline, job.scheduler)
    if job.trajectory is not None:
        pipeline = with_trajectory(pipeline, Trajectory.load(job.trajectory))
    plan = ReusePlan.load(job.reuse) if job.reuse else None
    if job.runtime != "torch":
        precision: Any = job.precision
        pipeline = accelerate(
            pipeline,
            job.runtime,
            precision=precision,
            threads=job.threads,
            batch_size=job.batch_size,
            inputs=job.inputs,
            reuse=plan,
        )
    elif plan is not None:
        pipeline = with_reuse(pipeline, plan)
    least = math.ceil(
        STEPS / float(job.inputs.get("strength", 1))
    )  # image-to-image leaves out the first ones
    steps = job.steps if plan else steps_of(pipeline, max(STEPS, least))
    sample(pipeline, 0, job.batch_size, steps=steps, seed=0, inputs=job.inputs)
    return _memory("VmHWM"), libraries


def _memory(name: str) -> int:
    """Bytes of one line of /proc/self/status ("VmHWM:   12345 kB")."""
    if not PROC_STATUS.exists():
        raise OctavoError("memory: can be measured on Linux only")
    for line in PROC_STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise OctavoError(f"memory: {PROC_STATUS} has no {name}")


if __name__ == "__main__":
    print(json.dumps(run(MemoryJob(**json.loads(sys.argv[1])))))

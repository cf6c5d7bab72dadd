"""Images generated in shards: resumable after a kill, and the same bits for any number of processes."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import nn
from tqdm import tqdm

from octavo.diffusion import find_denoiser
from octavo.errors import OctavoError
from octavo.evaluation.generate import Images, check_counts, sample
from octavo.files import atomic_path, cache_folder
from octavo.fingerprint import pipeline_fingerprint, versions
from octavo.processes import Processes
from octavo.runtimes import Executor, executors_of
from octavo.runtimes.cuda.executor import TorchCudaExecutor
from octavo.runtimes.openvino import OpenVINOExecutor
from octavo.runtimes.saturation import adds_in_16_bits
from octavo.work import held

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


LEVELS = 65535
"""Pixels are kept in 16 bits: round(65535 x). 65535 = 257 * 255 is odd, so that rounding further to 8 bits gives what
rounding at once gives; the error is at most 7.7e-6, where float16's is 2.4e-4."""
VERSIONS = ("octavo", "torch", "diffusers", "numpy", "openvino")


@dataclass(frozen=True)
class ShardStore:
    """Images 0 .. num_images-1 in a folder, one safetensors file for each batch: shard b starts at image b * B.

    Every shard is a whole batch, also the last: what image k looks like does not depend on how many are wanted.
    """

    folder: Path
    num_images: int
    batch_size: int

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def path(self, shard: int) -> Path:
        return self.folder / f"images-{shard:06d}.safetensors"

    def has(self, shard: int) -> bool:
        return self.path(shard).is_file()

    def wanted(self, shard: int) -> int:
        """How many of the shard's images are among the first `num_images`."""
        return min(self.batch_size, self.num_images - shard * self.batch_size)

    def num_done(self) -> int:
        """Images on disk, of those that are wanted."""
        return sum(self.wanted(shard) for shard in range(len(self)) if self.has(shard))

    def save(self, shard: int, images: Images) -> None:
        """Write the shard whole or not at all: float [B, height, width, channels] in [0, 1]."""
        levels = (np.clip(images, 0, 1).astype(np.float64) * LEVELS).round().astype(np.uint16)
        with atomic_path(self.path(shard)) as temporary:
            # safetensors writes memory in the order it lies in, and pipelines hand out transposed views
            save_file({"images": np.ascontiguousarray(levels)}, temporary)

    def load(self, shard: int) -> Images:
        """The shard's wanted images, float32 in [0, 1]. Raises `OctavoError` if the file is missing or damaged."""
        path = self.path(shard)
        try:
            levels: NDArray[np.uint16] = load_file(path)["images"]
            if levels.dtype != np.uint16 or levels.ndim != 4 or len(levels) != self.batch_size:
                raise ValueError(f"{levels.dtype} {levels.shape}")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise OctavoError(f"{path}: not readable as images; delete it and start again") from error
        return (levels[: self.wanted(shard)] / LEVELS).astype(np.float32)

    def images(self) -> Images:
        """All images in order, float32 [N, height, width, channels] in [0, 1]."""
        return np.concatenate([self.load(shard) for shard in range(len(self))])

    def remove(self) -> None:
        """Delete the folder, unless another process works in it."""
        if self.folder.is_dir():
            with contextlib.suppress(OctavoError), held(self.folder, "held"):
                shutil.rmtree(self.folder)


def generate_shards(
    pipeline: DiffusionPipeline,
    num_images: int,
    *,
    steps: int = 50,
    seed: int = 0,
    batch_size: int = 16,
    inputs: Mapping[str, Any] | None = None,
    workdir: str | os.PathLike[str] | None = None,
    processes: Processes | None = None,
    progress: bool = True,
    label: str = "sample",
    on_images: Callable[[int], Any] = lambda count: None,
) -> ShardStore:
    """Generate images 0 .. num_images-1 into a folder of `workdir` (default: Octavo's cache); they stay there.

    The folder is named by `job_name`. Shards found in it are kept: a killed run goes on after the last whole shard, and
    a larger `num_images` adds to a smaller one. Of the missing shards process r of `processes` makes every W-th; all
    must see the same folder. Image k depends on seed + k, and in its last bits on the batch size and the number of
    threads, because kernels add in another order; not on the number of processes. Returns when all shards are there.
    `on_images(n)` is called after every n images that this process makes, whole batches.

    Raises `OctavoError` for a count below 1, inputs that do not fit, or while another run makes the same images.
    """
    check_counts(num_images=num_images, steps=steps, batch_size=batch_size)
    together = processes or Processes()
    name = job_name(pipeline, steps=steps, seed=seed, batch_size=batch_size, inputs=inputs)
    folder = (Path(workdir) if workdir else cache_folder() / "evaluation") / name
    store = ShardStore(folder, num_images, batch_size)
    with contextlib.ExitStack() as stack:
        _hold(folder, together, stack)
        found = together.agree([store.has(shard) for shard in range(len(store))])
        missing = [shard for shard, is_there in enumerate(found) if not is_there]
        bar = tqdm(
            total=num_images,
            initial=store.num_done(),
            desc=label,
            unit="image",
            disable=not (progress and together.is_first),
        )
        with bar:
            for shard in missing[together.rank :: together.count]:
                first = shard * batch_size
                images = sample(pipeline, first, batch_size, steps=steps, seed=seed, inputs=inputs)
                store.save(shard, images)
                on_images(batch_size)
                bar.update(store.num_done() - bar.n)  # the other processes' shards too
            together.wait()
            bar.update(store.num_done() - bar.n)
    if store.num_done() < num_images:
        raise OctavoError(f"{folder}: shards are missing; all processes must see the same folder")
    return store


def _hold(folder: Path, processes: Processes, stack: contextlib.ExitStack) -> None:
    """The first process takes the folder for all; each raises `OctavoError` if it cannot."""
    taken = f"{folder}: another run makes the same images; wait for it"
    free = True
    if processes.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(held(folder, taken))
        except OctavoError:
            free = False
    if processes.agree([free]) == [0]:
        raise OctavoError(taken)


def job_name(
    pipeline: DiffusionPipeline, *, steps: int, seed: int, batch_size: int, inputs: Mapping[str, Any] | None
) -> str:
    """SHA-256 (32 hex digits) of everything that decides the bits of image k, whatever their number.

    That is every network of the pipeline, its scheduler with its settings, steps, seed, batch size, inputs, the
    runtime with its precision and threads, library versions, and the processor's instructions.
    """
    runtime, networks = executed(pipeline)
    libraries = list(versions(*VERSIONS).values())
    machine = [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    decisions = [steps, seed, batch_size, runtime, libraries, machine]
    return pipeline_fingerprint(pipeline, decisions, inputs, networks)


def executed(pipeline: DiffusionPipeline) -> tuple[list[Any], dict[str, nn.Module] | None]:
    """What computes: the runtime, its precision and threads, JSON-safe; and the networks it executes, by component.

    No networks where they execute themselves, in torch.
    """
    executors = executors_of(pipeline)
    executor = executors.pop("", None)
    if executor is None:
        return _runtime(None), None
    component, _ = find_denoiser(pipeline)
    runtime, networks = _runtime(executor), {component: executor.denoiser}
    for prefix, further in executors.items():  # in place of their components: what else those hold they share
        runtime.append([prefix, _runtime(further)])
        networks[prefix] = further.denoiser
    return runtime, networks


def _runtime(executor: Executor | None) -> list[Any]:
    if executor is None:
        return ["torch"]
    precisions = sorted({graph.precision for graph in executor.graphs.values()})
    threads = executor.threads or os.cpu_count()
    if isinstance(executor, TorchCudaExecutor):
        processor = (
            torch.cuda.get_device_name(executor.device) if executor.device.type == "cuda" else "interpreter"
        )
        return [executor.runtime, precisions, processor, *versions("triton").values()]
    if not isinstance(executor, OpenVINOExecutor):
        return ["onnx", precisions, threads, *versions("onnxruntime").values()]
    plan = getattr(executor, "plan", None)
    reuse = [] if plan is None else [plan.to_dict()]
    return [executor.runtime, precisions, threads, adds_in_16_bits(), executor.timesteps, *reuse]

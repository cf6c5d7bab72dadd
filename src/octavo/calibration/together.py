"""The costly half of a calibration shared by several processes: pairs and observations, merged exactly."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from octavo.calibration.collect import collect_pairs
from octavo.calibration.job import job_name, job_path, taken
from octavo.calibration.observations import STATE_FILE, merge_observations, observe
from octavo.calibration.quantize import planned
from octavo.calibration.recipe import PTQ4DM
from octavo.errors import OctavoError
from octavo.processes import Processes
from octavo.work import held

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def prepare_together(
    pipeline: DiffusionPipeline,
    recipe: PTQ4DM,
    processes: Processes,
    *,
    seed: int = 0,
    batch_size: int = 16,
    inputs: Mapping[str, Any] | None = None,
    workdir: str | os.PathLike[str] | None = None,
    components: Sequence[str] | None = None,
    progress: bool = True,
) -> None:
    """Fill the folder of a calibration's work, all processes together, so that `calibrate` goes on from there.

    Called by every process with the same arguments; all must see the same `workdir`. Each process makes every W-th
    batch of pairs, then observes the network on every W-th batch; the observers, which count integers, are added up by
    the first process. What `calibrate` then finds is what it would have made itself, bit for bit on the same number of
    threads. Killed and started again, with another number of processes too, finished batches of pairs are kept.

    `components` is only checked here: images for a VAE are made by the first process, in `calibrate`.

    Raises `OctavoError`, in every process, for all that `calibrate` refuses before it collects, and while another run
    works on the same job.
    """
    plan = planned(pipeline, recipe, batch_size=batch_size, inputs=inputs, components=components)
    pipeline = plan.pipeline
    folder = job_path(workdir, job_name(pipeline, recipe, seed, batch_size, inputs))
    with ExitStack() as stack:
        free = True
        if processes.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(held(folder, taken(folder)))
            except OctavoError:
                free = False
        if processes.agree([free]) == [0]:
            raise OctavoError(taken(folder))
        show = progress and processes.is_first
        pairs = collect_pairs(
            pipeline,
            recipe,
            folder,
            seed=seed,
            batch_size=batch_size,
            inputs=inputs,
            processes=processes,
            progress=show,
        )
        if processes.agree([(folder / STATE_FILE).exists()]) == [0]:
            observe(plan.denoiser, pairs, state_folder=folder, processes=processes, progress=show)
            processes.wait()
            if processes.is_first:
                merge_observations(folder, processes.count, len(pairs))
        processes.wait()

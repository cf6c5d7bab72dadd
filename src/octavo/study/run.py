"""Run the study cell by cell, going on where an earlier run stopped, and write what is known so far."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from octavo.calibration import PTQ4DM, trace
from octavo.calibration.job import job_folder, job_name
from octavo.diffusion import find_denoiser, sample_shape
from octavo.errors import OctavoError
from octavo.evaluation.compare import FEWEST
from octavo.evaluation.features import (
    GRAPH_SUFFIXES,
    check_images,
    contents_of,
    default_features,
    load_features,
)
from octavo.evaluation.generate import check_makes_images
from octavo.files import atomic_path, read_json, write_json
from octavo.fingerprint import versions
from octavo.places import check_place
from octavo.quantization import quantized_layers
from octavo.study.activations import activations_over_time
from octavo.study.cells import Cell, CellStore, by_trajectories, plan_cells
from octavo.study.markdown import study_markdown
from octavo.study.options import StudyOptions
from octavo.study.results import COLUMNS, tables_of
from octavo.study.samplers import with_sampler
from octavo.study.sources import check_fits
from octavo.study.tables import Table, base_variant, plan_tables
from octavo.study.variants import digest
from octavo.study.workbench import Workbench
from octavo.work import LOCK, digest_value, held
from octavo.writers import remove_unfinished

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FORMAT = 1
WORK, RESULTS, PAGE, ACTIVATIONS = "work", "study.json", "study.md", "activations.json"
PACKAGES = ("octavo", "torch", "diffusers", "openvino", "numpy")


def run_study(
    pipeline: DiffusionPipeline,
    out: str | os.PathLike[str],
    options: StudyOptions | None = None,
    *,
    name: str = "",
    inputs: Mapping[str, Any] | None = None,
    images: NDArray[np.uint8] | None = None,
    command: str = "",
    progress: bool = True,
) -> dict[str, Any]:
    """Measure the paper's tables on a full-precision pipeline; returns what `study.json` holds.

    `out` gets `cells/` (one JSON file for each variant and calibration seed, written whole), `references/` (the
    full-precision images of each sampler), `study.json`, `study.md` and `activations.json`. Stopped at any time and
    called again, it goes on after the last finished cell, and within a cell after the last batch of pairs; results
    are written also when it is interrupted. Cells of other options in the same folder are kept, and left out.

    name      of the model, for the page; `command`: how the study was started.
    inputs    what the pipeline's call needs besides (prompts, class labels).
    images    real images, uint8 [M, height, width, 1 or 3]: T2's x_0, and the real data of the distances. None: the
              model's own samples, and the statistics that come with the features.

    `pipeline` stays as it was. Raises `OctavoError` for a pipeline that is quantized already, options or images that
    do not fit, a damaged cell, or a folder in which another process works.
    """
    options = options or StudyOptions()
    out = Path(out)
    check_place(out / RESULTS)
    check_makes_images(pipeline)
    _, denoiser = find_denoiser(pipeline)
    if any(True for _ in quantized_layers(denoiser)):
        raise OctavoError("pipeline: is quantized already; a study starts from the full-precision model")
    if images is not None:
        check_images(images)
        if "T2" in options.tables:
            check_fits(images, pipeline, inputs)
        if len(images) < FEWEST:
            raise OctavoError(
                f"images: {len(images)} are too few for distances to them; give at least {FEWEST}"
            )
    if options.features == "auto":
        options = replace(options, features=default_features(sample_shape(pipeline, inputs)))
    load_features(options.features)  # tells what is missing before anything is written
    base = with_sampler(pipeline, options.base_sampler)
    traced = trace(base, inputs)
    tables = plan_tables(options, pipeline, traced)
    cells = plan_cells(tables, options.seeds)
    model = job_name(pipeline, PTQ4DM(), 0, 1, inputs)
    store = CellStore(out / "cells", _setting(options, model, images))
    study = _Study(out, options, name or type(pipeline).__name__, command, tables, cells, store)
    (out / WORK).mkdir(parents=True, exist_ok=True)
    with (
        held(
            out / WORK, f"{out}: another process writes a study here; wait for it, or choose another folder"
        ),
        job_folder(out / WORK, digest(store.setting)) as work,
    ):
        for folder in (out, out / "cells", out / "references"):
            remove_unfinished(folder)
        bench = Workbench(
            pipeline,
            traced,
            options,
            work,
            out / "references",
            digest(store.setting),
            inputs=inputs,
            images=images,
        )
        missing = [cell for cell in cells if store.load(cell) is None]
        try:
            with tqdm(total=len(missing), desc="study", unit="cell", disable=not progress) as bar:
                for group in by_trajectories(missing):
                    for cell in group:
                        bar.set_postfix_str(cell.variant.slug, refresh=True)
                        store.save(cell, bench.measure(cell))
                        bar.update(1)
                        study.write()
            if study.activations() is None:
                study.write_activations(bench)
        finally:
            results = study.write()
    with suppress(OSError):  # the work of a study with other options, which was killed, is in it
        (out / WORK / LOCK).unlink()
        (out / WORK).rmdir()
    return results


def _setting(options: StudyOptions, model: str, images: NDArray[np.uint8] | None) -> dict[str, Any]:
    """What every cell shares and is named by."""
    shared = ("num_images", "batch_size", "features", "image_seed", "permutations")
    every = options.to_dict()
    contents = hashlib.sha256()
    digest_value(contents, images, "images")
    if options.features.endswith(GRAPH_SUFFIXES):
        contents.update(contents_of(Path(options.features)).encode())
    return {
        "model": model,
        "images": contents.hexdigest()[:16],
        "engine": [
            *versions(*PACKAGES).values(),
            torch.get_num_threads(),
            torch.backends.cpu.get_cpu_capability(),
        ],
        **{name: every[name] for name in shared},
    }


class _Study:
    """What is written: the activations, and the tables from the cells measured so far, as JSON and Markdown."""

    def __init__(
        self,
        out: Path,
        options: StudyOptions,
        name: str,
        command: str,
        tables: Sequence[Table],
        cells: Sequence[Cell],
        store: CellStore,
    ) -> None:
        self.out, self.options, self.name, self.command = out, options, name, command
        self.tables, self.cells, self.store = tables, cells, store
        self.base = Cell(base_variant(options), 0)

    def activations(self) -> dict[str, Any] | None:
        """Those on disk, if they are this study's: of its model, images and base row."""
        path = self.out / ACTIVATIONS
        found = read_json(path) if path.is_file() else None
        return found if isinstance(found, dict) and found.get("setting") == self._activations_name() else None

    def write_activations(self, bench: Workbench) -> None:
        sampler = self.base.variant.sampler
        found = activations_over_time(
            with_sampler(bench.pipeline, sampler),
            bench.quantized(self.base),
            sampler,
            seed=self.options.image_seed,
            inputs=bench.inputs,
        )
        write_json(self.out / ACTIVATIONS, {"setting": self._activations_name(), **found})

    def _activations_name(self) -> str:
        return digest(self.store.setting, self.base.variant.to_dict())

    def write(self) -> dict[str, Any]:
        measured = [found for cell in self.cells if (found := self.store.load(cell)) is not None]
        layers = self.activations()
        study = {
            "format": FORMAT,
            "model": self.name,
            "made": {
                "command": self.command,
                "machine": platform.processor() or platform.machine(),
                "threads": torch.get_num_threads(),
                "versions": versions(*PACKAGES),
            },
            "options": self.options.to_dict(),
            "finished": len(measured) == len(self.cells) and layers is not None,
            "cells": {
                "done": len(measured),
                "planned": len(self.cells),
                "seconds": round(sum(sum(found["seconds"].values()) for found in measured), 1),
            },
            "figures": list(COLUMNS),
            "tables": tables_of(self.tables, self.options.seeds, self.store.load),
            "activations": ACTIVATIONS if layers else None,
        }
        write_json(self.out / RESULTS, study)
        with atomic_path(self.out / PAGE) as temporary:
            temporary.write_text(study_markdown({**study, "activation_layers": layers}), encoding="utf-8")
        return study

"""The workbench a cell is measured on: calibrate, quantize, sample, compare, with whatever cells share made once."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from octavo.calibration import (
    PairStore,
    collect_pairs,
    observe,
    quantize_observed,
    round_weights,
    rules_of,
)
from octavo.calibration.observations import Observations
from octavo.calibration.quantized_denoiser import RoundedWeight
from octavo.calibration.tracing import Trace
from octavo.diffusion import find_denoiser
from octavo.evaluation.compare import compare
from octavo.evaluation.comparison import Comparison
from octavo.evaluation.features import FeatureExtractor, Features, extract, load_features, real_statistics
from octavo.evaluation.generate import Images, generate, to_uint8
from octavo.evaluation.intervals import Estimate
from octavo.files import atomic_path
from octavo.quantization import QParams
from octavo.study.cells import Cell, trajectories_of
from octavo.study.engine import execute
from octavo.study.options import StudyOptions
from octavo.study.samplers import Sampler, with_sampler
from octavo.study.sources import given_samples, own_samples, pairs_from
from octavo.study.variants import Variant, digest

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SEED_STRIDE = 1_000_000
"""Calibration seed k starts its images at (k + 1) x this: none of them is an image that is compared."""

FIGURES = (
    "psnr",
    "psnr_pooled",
    "ssim",
    "fd",
    "sfd",
    "kid",
    "fd_real",
    "inception_score",
    "precision",
    "recall",
    "fd_real_difference",
    "sfd_real",
    "kid_real",
    "precision_real",
    "recall_real",
)
OF_REFERENCE = {
    name: f"{name}_reference"
    for name in ("fd_real", "inception_score", "sfd_real", "kid_real", "precision_real", "recall_real")
}


@dataclass
class Workbench:
    """A full-precision pipeline, ready to be quantized in many ways.

    work        a folder for what can be made again: pairs, observers, rounded weights, compiled graphs.
    references  a folder for the full-precision images, one file for each sampler.
    images      real images, uint8 [M, height, width, channels], or None.
    """

    pipeline: DiffusionPipeline
    traced: Trace
    options: StudyOptions
    work: Path
    references: Path
    model: str
    inputs: Mapping[str, Any] | None = None
    images: NDArray[np.uint8] | None = None
    extractor: FeatureExtractor = field(init=False)
    real: Features | None = field(init=False)
    _seen: tuple[str, Observations] | None = field(default=None, init=False)
    _reference: tuple[Sampler, Images] | None = field(default=None, init=False)
    _trajectories: Path | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.extractor = load_features(self.options.features)
        self.real = None if self.images is None else extract(self.extractor, self.images)

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Calibrate, quantize, sample and compare; JSON-safe."""
        start = time.perf_counter()
        reference = self.reference(cell.variant.sampler)
        at_reference = time.perf_counter()
        quantized = self.quantized(cell)
        at_quantized = time.perf_counter()
        images, how = self._sampled(quantized, cell.variant.sampler.steps)
        at_sampled = time.perf_counter()
        figures = self._compared(images, reference)
        at_compared = time.perf_counter()
        return {
            "how": how
            if cell.variant.network
            else how.replace("float", "operations simulated, network in float"),
            "num_images": len(images),
            "figures": {
                name: estimate.as_json()
                for name in FIGURES
                if isinstance(estimate := getattr(figures, name), Estimate)
            },
            "reference_figures": {
                name: estimate.as_json()
                for name, theirs in OF_REFERENCE.items()
                if isinstance(estimate := getattr(figures, theirs), Estimate)
            },
            "p_same": figures.p_same,
            "p_same_real": figures.p_same_real,
            "seconds": {
                "reference": round(at_reference - start, 2),
                "quantize": round(at_quantized - at_reference, 2),
                "sample": round(at_sampled - at_quantized, 2),
                "compare": round(at_compared - at_sampled, 2),
            },
        }

    def reference(self, sampler: Sampler) -> Images:
        """The full-precision images of a sampler: made once, kept on disk, float32 [N, height, width, channels]."""
        if self._reference is None or self._reference[0] != sampler:
            options = self.options
            name = digest(
                self.model, str(sampler), options.num_images, options.batch_size, options.image_seed
            )
            path = self.references / f"{str(sampler).lower()}-{name}.safetensors"
            if not path.is_file():
                made, _ = self._sampled(with_sampler(self.pipeline, sampler), sampler.steps)
                with atomic_path(path) as temporary:
                    save_file({"images": torch.from_numpy(made).contiguous()}, temporary)
            self._reference = sampler, load_file(path)["images"].numpy()
        return self._reference[1]

    def quantized(self, cell: Cell) -> DiffusionPipeline:
        variant = cell.variant
        return quantize_observed(
            with_sampler(self.pipeline, variant.sampler),
            variant.recipe,
            self.observations(cell),
            self.traced,
            network=variant.network,
            weights=self._weights(variant) if variant.network else None,
        )

    def observations(self, cell: Cell) -> Observations:
        """What the network's layers see on the cell's calibration pairs; kept for the next cell of the same pairs."""
        key = digest(cell.variant.trajectories(), cell.variant.source, cell.seed)
        if self._seen is None or self._seen[0] != key:
            pairs = self._pairs(cell)
            _, denoiser = find_denoiser(self.pipeline)
            self._seen = key, observe(denoiser, pairs, state_folder=pairs.folder, progress=False)
        return self._seen[1]

    def _pairs(self, cell: Cell) -> PairStore:
        """The cell's pairs. Only those of one set of trajectories are on disk at a time."""
        variant, options = cell.variant, self.options
        folder = self.work / f"pairs-{trajectories_of(variant)}-seed{cell.seed}"
        if self._trajectories is not None and self._trajectories != folder:
            shutil.rmtree(self._trajectories, ignore_errors=True)
        self._trajectories = folder
        pipeline, seed = with_sampler(self.pipeline, variant.sampler), (cell.seed + 1) * SEED_STRIDE
        pairs = collect_pairs(
            pipeline,
            variant.recipe,
            folder / "denoising",
            seed=seed,
            batch_size=options.batch_size,
            inputs=self.inputs,
            progress=False,
        )
        if variant.source == "denoising":
            return pairs
        num_images = -(-variant.recipe.samples // variant.recipe.pairs_per_trajectory)
        if variant.source == "noise":
            clean = torch.zeros(1, *next(iter(pairs.load(0)[0].args.values())).shape[1:])
        elif self.images is not None:
            clean = given_samples(self.images, num_images, seed=seed)
        else:
            clean = own_samples(
                pipeline,
                num_images,
                steps=variant.sampler.steps,
                seed=seed,
                batch_size=options.batch_size,
                inputs=self.inputs,
            )
        return pairs_from(
            variant.source,
            pairs,
            folder / variant.source,
            pipeline.scheduler,
            clean,
            steps=variant.sampler.steps,
            seed=seed,
        )

    def _weights(self, variant: Variant) -> dict[str, RoundedWeight]:
        """Rounded once for each metric and bit width: they do not depend on the pairs."""
        recipe = variant.recipe
        made_by = f"{recipe.metric}-{recipe.rounding}-{recipe.weights}-{recipe.group_size}"
        made_by += "-pairs" if recipe.pair_limit else ""
        path = self.work / f"weights-{made_by}.safetensors"
        if not path.is_file():
            _, denoiser = find_denoiser(self.pipeline)
            rules = rules_of(replace(recipe, time_embedding="quantized"), self.traced)
            tensors: dict[str, torch.Tensor] = {}
            for name, (weight, qparams) in round_weights(denoiser, recipe, rules).items():
                tensors |= {f"{name}/weight": weight, f"{name}/scale": qparams.scale}
                tensors[f"{name}/zero_point"] = qparams.zero_point
                if qparams.multiplier is not None:
                    tensors[f"{name}/multiplier"] = qparams.multiplier
            with atomic_path(path) as temporary:
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary)
        stored = load_file(path)
        names = dict.fromkeys(key.rpartition("/")[0] for key in stored)
        return {
            name: (
                stored[f"{name}/weight"],
                QParams(
                    stored[f"{name}/scale"], stored[f"{name}/zero_point"], stored.get(f"{name}/multiplier")
                ),
            )
            for name in names
        }

    def _sampled(self, pipeline: DiffusionPipeline, steps: int) -> tuple[Images, str]:
        options, compiled = self.options, self.work / "compiled"
        batch_size = min(options.batch_size, options.num_images)
        try:
            fast, how = execute(pipeline, batch_size, compiled, self.inputs)
            images = generate(
                fast,
                options.num_images,
                steps=steps,
                seed=options.image_seed,
                batch_size=batch_size,
                inputs=self.inputs,
                progress=False,
            )
        finally:
            shutil.rmtree(compiled, ignore_errors=True)
        return images, how

    def _compared(self, images: Images, reference: Images) -> Comparison:
        real = self.real or real_statistics(self.options.features, images.shape[1:])
        return compare(
            to_uint8(images),
            to_uint8(reference),
            extractor=self.extractor,
            real=real,
            paired=True,
            floats=images,
            reference_floats=reference,
            seed=0,
            permutations=self.options.permutations,
        )

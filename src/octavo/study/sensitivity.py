"""Which layers matter: each alone quantized, its effect on the final images measured, resumable layer by layer"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from octavo.calibration import PTQ4DM, rules_of, trace
from octavo.calibration.job import job_name
from octavo.calibration.steps import sub_pixels
from octavo.checkpoint import float32_bytes, tensor_bytes
from octavo.diffusion import find_denoiser, with_denoiser
from octavo.errors import OctavoError
from octavo.evaluation.generate import check_counts, check_makes_images
from octavo.files import read_json, write_json
from octavo.fingerprint import versions
from octavo.places import check_place
from octavo.quantization import quantized_layers, walk, with_sub_pixel
from octavo.study.layer_variants import Layers, layer_variants, stored_bytes
from octavo.study.one_at_a_time import OneAtATime
from octavo.study.ranking import ranking
from octavo.study.variants import digest
from octavo.work import held
from octavo.writers import remove_unfinished

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FORMAT = 1
WORK, MEASURED, RESULTS = "work", "measured", "sensitivity.json"
PACKAGES = ("octavo", "torch", "diffusers", "numpy")
IMAGE_STREAM = 1 << 30
"""Added to the seeds of the images that layers are ranked by: neither calibration's, nor those a user judges by."""


@dataclass(frozen=True)
class SensitivityOptions:
    """How much is measured.

    weight_bits  the options of every layer beside float; activations are quantized as the recipe says.
    num_images   images that end effects are means over; `steps`: of the pipeline's own sampler.
    batch_size   images denoised together, here and in calibration; `seed`: of both.
    """

    weight_bits: tuple[int, ...] = (8, 4)
    num_images: int = 8
    steps: int = 20
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(num_images=self.num_images, steps=self.steps, batch_size=self.batch_size)
        if self.num_images < 2:
            raise OctavoError(f"num_images: {self.num_images} is not at least 2, which an interval needs")
        if not self.weight_bits or not all(2 <= bits <= 8 for bits in self.weight_bits):
            raise OctavoError(f"weight_bits: {self.weight_bits} are not whole numbers from 2 to 8")


@dataclass
class Measurements:
    """What is measured for one model, recipe and set of options; each figure is a JSON file, whole or absent."""

    pipeline: DiffusionPipeline
    folder: Path
    setting: str
    options: SensitivityOptions
    variants: dict[int, Layers]
    bench: OneAtATime
    results: dict[str, Any] = field(default_factory=dict)

    def kept(self, name: str, key: Any, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured under this key, or is now. Raises `OctavoError` for a damaged file."""
        path = self.path(name, key)
        if not path.is_file():
            write_json(path, {"what": name, **measure()})
        found = read_json(path)
        if not isinstance(found, dict) or found.get("what") != name:
            raise OctavoError(
                f"{path}: is not a measurement; delete it, and the same command measures it again"
            )
        return found

    def path(self, name: str, key: Any) -> Path:
        safe = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name)
        return self.folder / f"{safe[:120]}-{digest(FORMAT, self.setting, name, key)}.json"


@contextmanager
def measured_sensitivity(
    pipeline: DiffusionPipeline,
    out: str | os.PathLike[str],
    recipe: PTQ4DM,
    options: SensitivityOptions | None = None,
    *,
    name: str = "",
    inputs: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Iterator[Measurements]:
    """Measure every layer of the recipe at every width, alone in an otherwise float network; `out` is held meanwhile.

    The end effect of layer l at b bits is the mean squared error of the final images, in [0, 1], of the pipeline with
    only this layer quantized against those of the float pipeline from the same seeds. Beside it: the error of single
    evaluations at each step; both again with all layers quantized; the end effect of all layers quantized at one step
    only, for every step; and the floor, float against float in batches of another size.

    `out` gets `measured/` (a JSON file each), `work/` (the quantized layers, so that another budget needs no second
    calibration) and `sensitivity.json` (see `octavo.study.ranking`). Stopped at any time and called again it goes on
    after the last layer. `pipeline` stays as it was; `inputs` are what its call needs besides.

    Raises `OctavoError` for a pipeline that is quantized already, a recipe that does not fit, a damaged file, or a
    folder in which another process works.
    """
    options = options or SensitivityOptions()
    out = Path(out)
    check_place(out / RESULTS)
    check_makes_images(pipeline)
    component, denoiser = find_denoiser(pipeline)
    if any(True for _ in quantized_layers(denoiser)):
        raise OctavoError("pipeline: is quantized already; give the full-precision model")
    if (
        recipe.sub_pixel
    ):  # layers are swapped into a network whose upsamplings are as those of a quantized one
        changed = sub_pixels(recipe, denoiser, rules_of(recipe, trace(pipeline, inputs)))
        pipeline = with_denoiser(pipeline, component, with_sub_pixel(denoiser, changed))
    (out / WORK).mkdir(parents=True, exist_ok=True)
    (out / MEASURED).mkdir(exist_ok=True)
    with held(out / WORK, f"{out}: another process measures here; wait for it, or choose another folder"):
        for folder in (out, out / MEASURED, out / WORK):
            remove_unfinished(folder)
        variants = layer_variants(
            pipeline,
            recipe,
            options.weight_bits,
            out / WORK,
            seed=options.seed,
            batch_size=options.batch_size,
            inputs=inputs,
            progress=progress,
        )
        bench = OneAtATime(
            pipeline,
            num_images=options.num_images,
            steps=options.steps,
            seed=options.seed + IMAGE_STREAM,
            batch_size=options.batch_size,
            inputs=inputs,
        )
        setting = _setting(pipeline, recipe, options, inputs)
        found = Measurements(pipeline, out / MEASURED, setting, options, variants, bench)
        found.results = _measure(found, recipe, name or type(pipeline).__name__, denoiser, progress)
        write_json(out / RESULTS, found.results)
        yield found


def _setting(
    pipeline: DiffusionPipeline, recipe: PTQ4DM, options: SensitivityOptions, inputs: Mapping[str, Any] | None
) -> str:
    """What every measurement is named by. Widths are not in it: another one leaves the others as they are."""
    job = job_name(pipeline, recipe, options.seed, options.batch_size, inputs)
    shared = {key: value for key, value in asdict(options).items() if key != "weight_bits"}
    engine = [*versions(*PACKAGES).values(), torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()]
    return digest(job, recipe.to_dict(), shared, engine)


def _measure(
    found: Measurements, recipe: PTQ4DM, name: str, original: nn.Module, progress: bool
) -> dict[str, Any]:
    bench, variants = found.bench, found.variants
    widths = list(variants)
    layers = list(variants[widths[0]])

    def both(quantized: Layers) -> dict[str, Any]:
        return {
            "squared_errors": bench.end_effect(quantized).tolist(),
            "single_errors": bench.single_errors(quantized).tolist(),
        }

    def alone(bits: int, layer: str) -> dict[str, Any]:
        return both({layer: variants[bits][layer]})

    def at_step(t: float) -> dict[str, Any]:
        return {"squared_errors": bench.end_effect_of_step(variants[widths[0]], t).tolist()}

    timesteps = list(dict.fromkeys(bench.timesteps))
    jobs: list[tuple[str, Any, Callable[[], dict[str, Any]]]] = [
        ("floor", None, lambda: {"squared_errors": bench.floor().tolist()}),
        *((f"all-w{bits}", "all", lambda bits=bits: both(variants[bits])) for bits in widths),
        *((f"step-{t:g}", widths[0], lambda t=t: at_step(t)) for t in timesteps),
        *(
            (f"{layer}-w{bits}", "layer", lambda bits=bits, layer=layer: alone(bits, layer))
            for bits in widths
            for layer in layers
        ),
    ]
    done = {}
    missing = sum(not found.path(what, key).is_file() for what, key, _ in jobs)
    with tqdm(total=missing, desc="sensitivity", unit="run", disable=not (progress and missing)) as bar:
        for what, key, measure in jobs:
            is_new = not found.path(what, key).is_file()
            bar.set_postfix_str(what, refresh=is_new)
            done[what] = found.kept(what, key, measure)
            bar.update(int(is_new))
    # a layer that stays float is stored as in the original, whatever it is here
    floats = {layer: stored_bytes(module) for layer, module in walk(original) if layer in set(layers)}
    measured = {
        "format": FORMAT,
        "model": name,
        "options": asdict(found.options),
        "recipe": recipe.to_dict(),
        "made": {"threads": torch.get_num_threads(), "versions": versions(*PACKAGES)},
        "float32_bytes": float32_bytes(original),
        "other_bytes": tensor_bytes(original) - sum(floats.values()),
        "timesteps": list(bench.timesteps),
        "floor": done["floor"]["squared_errors"],
        "steps": {f"{t:g}": done[f"step-{t:g}"]["squared_errors"] for t in timesteps},
        "all": {str(bits): _plain(done[f"all-w{bits}"]) for bits in widths},
        "layers": [
            {
                "layer": layer,
                "float_bytes": floats[layer],
                "options": {
                    str(bits): {
                        "bytes": stored_bytes(variants[bits][layer]),
                        **_plain(done[f"{layer}-w{bits}"]),
                    }
                    for bits in widths
                },
            }
            for layer in layers
        ],
    }
    return {**measured, "ranking": ranking(measured)}


def _plain(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "what"}

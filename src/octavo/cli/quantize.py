"""`octavo quantize`: a pipeline in, its 8-bit version out."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.cli import recipe_options as option
from octavo.cli.inputs import Given, command_with, takes_inputs
from octavo.cli.patterns import check_patterns
from octavo.cli.shared import (
    BatchSizeOption,
    JsonOption,
    ModelArgument,
    ThreadsOption,
    check_given_json,
    holding,
    load_quietly,
    on_trajectory,
    print_figures,
    steps_for,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from octavo.calibration import PTQ4DM
    from octavo.diffusion import Distribution


@takes_inputs
def command(
    model: ModelArgument,
    out: Annotated[
        Path,
        typer.Option(
            help="The folder to write: an ordinary diffusers pipeline. One that Octavo wrote there before is replaced."
        ),
    ],
    recipe: option.Recipe = "best",
    weights: option.Weights = None,
    group_size: option.GroupSize = None,
    activations: option.Activations = 8,
    symmetric: option.Symmetric = False,
    timesteps: option.Timesteps = "ndtc",
    mean: option.Mean = None,
    std: option.Std = None,
    at: option.At = None,
    samples: option.Samples = 256,
    steps: option.Steps = None,
    trajectory: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Calibrate on the timesteps that `octavo trajectory` wrote, and write a pipeline that visits them.",
            callback=check_given_json,
        ),
    ] = None,
    pairs_per_trajectory: option.PairsPerTrajectory = 4,
    metric: option.Metric = "mse",
    rounding: option.Rounding = None,
    balance: option.Balance = None,
    absorb: option.Absorb = None,
    sub_pixel: option.SubPixel = None,
    pair_limit: option.PairLimit = None,
    float_activations: option.FloatActivations = None,
    timestep_groups: option.TimestepGroups = None,
    bias_correction: option.BiasCorrection = None,
    output_correction: option.OutputCorrection = None,
    attention_matmuls: option.AttentionMatmuls = None,
    exclude: option.Exclude = None,
    include: option.Include = None,
    bits_file: option.BitsFile = None,
    first_and_last: option.FirstAndLast = "float",
    time_embedding: option.TimeEmbedding = None,
    network_output: option.NetworkOutput = False,
    learned_variance: option.LearnedVariance = False,
    sampled_image: option.SampledImage = False,
    components: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="What is quantized, e.g. unet,vae: the VAE's decoder too, its layer patterns beginning with 'vae.' "
            "(default: the denoiser alone).",
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0, help="Of the calibration: its image k uses seed + k, in a range of seeds of its own."
        ),
    ] = 0,
    batch_size: BatchSizeOption = 16,
    threads: ThreadsOption = None,
    *,
    given: Given,
    json: JsonOption = False,
) -> None:
    """Calibrate MODEL over its denoising process (PTQ4DM) and write its 8-bit version.

    Killed and started again with the same arguments, it goes on from the last finished batch. Under
    `accelerate launch` the processes share the pairs and their observation; the first one does the rest. The same bits
    come out at the same number of threads, whatever the number of processes: a launched process takes one thread
    unless --threads says otherwise, `octavo quantize` alone takes all cores.
    """
    from octavo.api import quantize
    from octavo.calibration import named_recipe
    from octavo.calibration.components import further_components
    from octavo.calibration.job import work_kept
    from octavo.calibration.recipe import widths
    from octavo.checkpoint import save_pipeline
    from octavo.checkpoint.save import MODEL_CARD, check_target
    from octavo.diffusion import find_denoiser
    from octavo.diffusion.trajectories.eta import with_eta
    from octavo.errors import OctavoError
    from octavo.quantization.packing import BITS
    from octavo.runtimes.saturation import adds_in_16_bits
    from octavo.study.bits_file import other_fields, with_bits

    changes = {
        "weights": weights,
        "group_size": group_size,
        "rounding": rounding,
        "balance": balance,
        "absorb": absorb,
        "sub_pixel": sub_pixel,
        "pair_limit": pair_limit,
        "float_activations": float_activations,
        "timestep_groups": timestep_groups,
        "bias_correction": bias_correction,
        "output_correction": output_correction,
        "attention_matmuls": attention_matmuls,
        "time_embedding": time_embedding,
    }
    if Path(model).is_dir() and out.resolve() == Path(model).resolve():
        raise OctavoError(f"--out: {out} is the model itself, which would be replaced; choose another folder")
    check_target(out)
    start = time.perf_counter()
    pipeline = on_trajectory(load_quietly(model), trajectory)
    inputs = given.inputs(pipeline)
    if "eta" in inputs:  # the folder samples as it was calibrated
        pipeline = with_eta(pipeline, inputs.pop("eta"))
    chosen = named_recipe(
        recipe,
        **{name: value for name, value in changes.items() if value is not None},
        activations=activations,
        symmetric=symmetric,
        timesteps=_distribution(timesteps, mean, std, at),
        samples=samples,
        steps=steps_for(pipeline, steps, 100),
        pairs_per_trajectory=pairs_per_trajectory,
        metric=metric,
        include=tuple(include or ("*",)),
        exclude=tuple(exclude or ()),
        first_and_last=first_and_last,
        network_output=network_output,
        learned_variance=learned_variance,
        sampled_image=sampled_image,
    )
    further = further_components(pipeline, components)
    patterns = {"--include": include, "--exclude": exclude}
    check_patterns(model, pipeline, patterns, chosen.attention_matmuls, further)
    if bits_file is not None:
        chosen = with_bits(chosen, bits_file, find_denoiser(pipeline)[1])
        if differing := other_fields(chosen, bits_file):
            print(
                f"{bits_file}: its bits were chosen, and their budget is, under a recipe with other values of "
                f"{', '.join(differing)}",
                file=sys.stderr,
            )
    if group_size is not None and min(chosen.weights, *(bits[0] for bits in chosen.bits.values()), 8) > BITS:
        raise OctavoError(
            f"--group-size: no layer has weights of at most {BITS} bits; give --weights 4, or leave it out"
        )
    job: dict[str, Any] = {
        "seed": seed,
        "batch_size": batch_size,
        "inputs": inputs,
        "components": None if components is None else (find_denoiser(pipeline)[0], *further),
    }
    with ExitStack() as hold:
        if not _joined(pipeline, chosen, threads, out, hold, **job):
            return
        with work_kept():
            quantized = quantize(pipeline, chosen, **job)
            save_pipeline(quantized, out)
    component, denoiser = find_denoiser(quantized)
    of_denoiser = _figures_of(denoiser)
    stored, before = of_denoiser["bytes"], of_denoiser["float32_bytes"]
    figures: dict[str, Any] = {
        "out": str(out),
        "model_card": str(out / MODEL_CARD),
        "component": component,
        **of_denoiser,
        "seconds": round(time.perf_counter() - start, 1),
    }
    own_steps: tuple[object, ...] = (
        ("--steps", chosen.steps) if steps is not None and trajectory is None else ()
    )
    others = {name: _figures_of(getattr(quantized, name)) for name in further}
    if others:
        figures["components"] = others
    text = (
        f"{out}: {component} with {figures['quantized_layers']} quantized layers, {stored / 1e6:.1f} MB "
        f"({stored / before:.3f} of float32), in {figures['seconds']} s\n"
        + "".join(
            f"{name} with {row['quantized_layers']} quantized layers, {row['bytes'] / 1e6:.1f} MB "
            f"({row['size_ratio']:.3f} of float32)\n"
            for name, row in others.items()
        )
        + f"model card: {figures['model_card']}\n"
        f"next: {command_with(replace(given, eta=None), 'sample', out, *own_steps, '--out', 'grid.png')}"
    )
    print_figures(figures, json, text)
    if adds_in_16_bits() and not chosen.pair_limit and 8 in widths(chosen.weights, chosen.bits):
        print(
            "This CPU has no VNNI: layers with 8-bit weights take two kernels each on it, and are about as fast as "
            "float. Quantized with --pair-limit they take one.",
            file=sys.stderr,
        )


def _figures_of(component: Any) -> dict[str, Any]:
    from octavo.checkpoint import float32_bytes, tensor_bytes
    from octavo.quantization import layer_counts

    stored, before = tensor_bytes(component), float32_bytes(component)
    return {
        **layer_counts(component),
        "bytes": stored,
        "float32_bytes": before,
        "size_ratio": round(stored / before, 4),
    }


def _joined(
    pipeline: DiffusionPipeline, recipe: PTQ4DM, threads: int | None, out: Path, hold: ExitStack, **job: Any
) -> bool:
    """What several processes share is done; whether this one goes on. `out` is held by the one that does."""
    from octavo.calibration.together import prepare_together
    from octavo.processes import join_processes, launched, leave_processes

    if not launched():
        hold.enter_context(holding(out))
        return True
    if threads is None:
        import torch

        torch.set_num_threads(1)
    processes = join_processes()
    try:
        hold.enter_context(holding(out, processes))
        if processes.count > 1:
            prepare_together(pipeline, recipe, processes, **job)
        return processes.is_first
    finally:
        leave_processes()


def _distribution(name: str, mean: float | None, std: str | None, at: float | None) -> Distribution:
    from octavo.diffusion import distribution
    from octavo.errors import OctavoError

    params: dict[str, object] = {
        key: value for key, value in (("mean", mean), ("at", at)) if value is not None
    }
    if std is not None:
        try:
            params["std"] = "sqrt" if std == "sqrt" else float(std)
        except ValueError as error:
            raise OctavoError(f"--std: {std!r} is neither a number nor 'sqrt'") from error
    return distribution(name, **params)

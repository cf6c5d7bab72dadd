"""`octavo quantize`: a pipeline in, its 8-bit version out."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.cli.inputs import Given, command_with, takes_inputs
from octavo.cli.patterns import check_patterns
from octavo.cli.shared import (
    BatchSizeOption,
    JsonOption,
    ModelArgument,
    ThreadsOption,
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
    recipe: Annotated[
        str,
        typer.Option(
            help="ptq4dm (the paper's calibration; its own setting adds --pairs-per-trajectory 1 --network-output "
            "--sampled-image), best (GPTQ rounding, balanced channels, sub-pixel convolutions, float "
            "activations in the layers that read only the timestep and in those that err most), w4a8 (4-bit "
            "weights, GPTQ rounding, balanced channels, sub-pixel convolutions); the options below change it."
        ),
    ] = "best",
    weights: Annotated[
        int | None, typer.Option(help="Bits of the weights, 2 to 8 (default: the recipe's).")
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="A scale for each so many consecutive weights of an output channel, where they have at most 4 bits "
            "(default: one scale per output channel)."
        ),
    ] = None,
    activations: Annotated[int, typer.Option(help="Bits of the activations, 2 to 8.")] = 8,
    symmetric: Annotated[
        bool, typer.Option(help="Symmetric s8 activations instead of u8 with a zero point.")
    ] = False,
    timesteps: Annotated[
        str, typer.Option(help="Which steps to look at: ndtc, uniform, single, skew_normal, as_published.")
    ] = "ndtc",
    mean: Annotated[
        float | None, typer.Option(help="ndtc: mean as a fraction of the steps (default 0.4).")
    ] = None,
    std: Annotated[
        str | None,
        typer.Option(help="ndtc: standard deviation as a fraction of the steps, or 'sqrt' (default 0.5)."),
    ] = None,
    at: Annotated[
        float | None, typer.Option(help="single: the step as a fraction of the steps left (default 0.5).")
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration pairs, at most 1024.")] = 256,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Sampler steps while calibrating (default: 100, or the trajectory's)."),
    ] = None,
    trajectory: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Calibrate on the timesteps that `octavo trajectory` wrote, and write a pipeline that visits them.",
        ),
    ] = None,
    pairs_per_trajectory: Annotated[
        int, typer.Option(help="Pairs caught along one denoising run (the paper: 1).")
    ] = 4,
    metric: Annotated[
        str, typer.Option(help="What a range minimises: mse (L_2.4), l1, cosine, kl, or minmax.")
    ] = "mse",
    rounding: Annotated[
        str | None,
        typer.Option(help="nearest, or gptq: by what each layer reads (default: the recipe's)."),
    ] = None,
    balance: Annotated[
        bool | None,
        typer.Option(
            help="Balance input channels against weights where a layer gains (default: the recipe's)."
        ),
    ] = None,
    absorb: Annotated[
        bool | None,
        typer.Option(
            help="Let the normalization or layer in front make balancing's multiplication where it can (default: the "
            "recipe's)."
        ),
    ] = None,
    sub_pixel: Annotated[
        bool | None,
        typer.Option(
            help="Convolutions behind an upsampling read the small image: the same in 4/9 of the multiply-adds, with "
            "16/9 of their weights (default: the recipe's)."
        ),
    ] = None,
    pair_limit: Annotated[
        bool | None,
        typer.Option(
            help="Keep neighbouring 8-bit weights within what CPUs without VNNI add exactly: one kernel a layer there "
            "instead of two (default: the recipe's)."
        ),
    ] = None,
    float_activations: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Leave the activations of the layers that err most in float, up to this share of the quantized "
            "layers' multiply-adds (0.1 is a tenth, 0 none), until int8 errs less than bf16 would (default: the "
            "recipe's).",
        ),
    ] = None,
    timestep_groups: Annotated[
        int | None,
        typer.Option(
            help="At most so many groups of timesteps, with an activation scale each where a layer gains by it "
            "(default: the recipe's, 1)."
        ),
    ] = None,
    bias_correction: Annotated[
        bool | None,
        typer.Option(help="Take each layer's mean output error out of its bias (default: the recipe's)."),
    ] = None,
    output_correction: Annotated[
        bool | None,
        typer.Option(
            help="Correct the network's output, timestep by timestep, by its error while calibrating (default: the "
            "recipe's)."
        ),
    ] = None,
    attention_matmuls: Annotated[
        bool | None,
        typer.Option(
            help="Attention's two products, Q K^T and P V, in integers too; slower than float on CPUs without VNNI "
            "(default: the recipe's)."
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Leave the layers of this name in float, e.g. 'mid_block.*'; may be repeated. Wins over --include.",
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Quantize the layers of this name alone, e.g. '*.attentions.*'; may be repeated (default: all).",
        ),
    ] = None,
    bits_file: Annotated[
        Path | None,
        typer.Option(
            help="Bits for each layer, as `octavo sensitivity --budget` writes them; they win over --weights."
        ),
    ] = None,
    first_and_last: Annotated[
        str, typer.Option(help="'float' or 'quantized': the layers that read the image and write the output.")
    ] = "float",
    time_embedding: Annotated[
        str | None,
        typer.Option(
            help="'float', 'weights' (in integers, with float activations) or 'quantized': the layers that read "
            "nothing but the timestep (default: the recipe's)."
        ),
    ] = None,
    network_output: Annotated[bool, typer.Option(help="Quantize the network's output too.")] = False,
    learned_variance: Annotated[bool, typer.Option(help="Quantize the learned variance too.")] = False,
    sampled_image: Annotated[
        bool, typer.Option(help="Quantize x_{t-1} too, as the network reads it.")
    ] = False,
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

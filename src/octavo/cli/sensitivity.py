"""`octavo sensitivity`: which layers matter for the images, and bits for each layer under a budget"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from octavo.cli.inputs import Given, command_with, takes_inputs
from octavo.cli.shared import (
    BatchSizeOption,
    JsonOption,
    ModelArgument,
    ThreadsOption,
    load_quietly,
    print_figures,
)

BITS = "bits.json"


@takes_inputs
def command(
    model: ModelArgument,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The folder to write into; what is in it already is gone on with (default: MODEL-sensitivity)."
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="KIND=VALUE",
            help="Choose float, 8 or 4 bits for each layer: size=0.2 (of the denoiser's float32 bytes) or latency=1.1 "
            "(over all layers in int8).",
        ),
    ] = None,
    bits_file: Annotated[
        Path | None,
        typer.Option(help=f"Where --budget writes the chosen bits (default: {BITS} in --out)."),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help="ptq4dm, best, w4a8: how layers are quantized (without best's choice of float activations); their "
            "weight bits are tried out."
        ),
    ] = "best",
    activations: Annotated[int, typer.Option(help="Bits of the activations, 2 to 8.")] = 8,
    samples: Annotated[int, typer.Option(help="Calibration pairs, at most 1024.")] = 256,
    calibration_steps: Annotated[int, typer.Option(help="Sampler steps while calibrating.")] = 100,
    num_images: Annotated[int, typer.Option(min=2, help="Images that an end effect is a mean over.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps of these images.")] = 20,
    layers: Annotated[int, typer.Option(min=1, help="Layers printed; the JSON file has all.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of the calibration and of the images.")] = 0,
    batch_size: BatchSizeOption = 16,
    threads: ThreadsOption = None,
    *,
    given: Given,
    json: JsonOption = False,
) -> None:
    """Rank the layers of MODEL by what quantizing each alone, at 8 and at 4 bits, does to the final images.

    Killed and started again with the same arguments, it goes on after the last layer; so does another --budget.
    """
    from octavo.calibration import named_recipe
    from octavo.diffusion import find_denoiser
    from octavo.errors import OctavoError
    from octavo.places import check_file_place
    from octavo.study.bits_file import write_bits
    from octavo.study.layer_variants import layer_recipe
    from octavo.study.mixed_precision import choice_text, choose_bits, layer_bits, parse_budget
    from octavo.study.ranking import ranking_text
    from octavo.study.sensitivity import RESULTS, SensitivityOptions, measured_sensitivity

    wanted = None if budget is None else parse_budget(budget)
    if bits_file is not None and wanted is None:
        raise OctavoError("--bits-file: needs a --budget by which bits are chosen")
    out = out or Path(f"{Path(model).name}-sensitivity")
    bits_file = bits_file or out / BITS
    check_file_place(bits_file)
    chosen_recipe = named_recipe(recipe, activations=activations, samples=samples, steps=calibration_steps)
    options = SensitivityOptions(num_images=num_images, steps=steps, batch_size=batch_size, seed=seed)
    pipeline = load_quietly(model)
    inputs = given.inputs(pipeline)
    with measured_sensitivity(pipeline, out, chosen_recipe, options, name=model, inputs=inputs) as found:
        results: dict[str, Any] = {**found.results, "file": str(out / RESULTS)}
        text = [ranking_text(results, layers)]
        if wanted is not None:
            chosen = choose_bits(found, wanted)
            _, denoiser = find_denoiser(pipeline)
            notes = {key: value for key, value in chosen.items() if key != "layers"}
            measured = layer_recipe(chosen_recipe).to_dict()
            write_bits(bits_file, denoiser, layer_bits(chosen), **notes, recipe=measured)
            results |= {"chosen": chosen, "bits_file": str(bits_file)}
            parts: list[object] = ["quantize", model, "--out", f"{Path(model).name}-mixed"]
            parts += ["--recipe", recipe, "--samples", samples, "--steps", calibration_steps]
            parts += ["--activations", activations, "--batch-size", batch_size, "--seed", seed]
            parts += ["--float-activations", 0] if chosen_recipe.float_activations else []
            next_command = command_with(given, *parts, "--bits-file", bits_file)
            text += [choice_text(chosen), f"bits: {shlex.quote(str(bits_file))}\nnext: {next_command}"]
    print_figures(results, json, "\n\n".join(text))

"""`octavo export`: the denoiser as a file that an engine runs without Octavo."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from octavo.cli.inputs import Given, takes_inputs
from octavo.cli.shared import (
    JsonOption,
    ModelArgument,
    ThreadsOption,
    load_quietly,
    print_figures,
    steps_for,
)


class FormatChoice(StrEnum):
    """What is written."""

    openvino = "openvino"
    onnx = "onnx"


class DialectChoice(StrEnum):
    """For which engines ONNX is written."""

    portable = "portable"
    onnxruntime = "onnxruntime"


@takes_inputs
def command(
    model: ModelArgument,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder to write; an export that is there is replaced.")
    ],
    format: Annotated[
        FormatChoice, typer.Option(help="openvino: IR (.xml, .bin); onnx: a QDQ graph with int8 weights.")
    ],
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Images denoised together, for static shapes (default: any number, where possible)."
        ),
    ] = None,
    dialect: Annotated[
        DialectChoice,
        typer.Option(
            help="onnx only. portable: for TensorRT and OpenVINO; onnxruntime: all layers in int8 on its CPU."
        ),
    ] = DialectChoice.portable,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Sampler steps whose timesteps export.json lists (default: 20, or the trajectory's)."
        ),
    ] = None,
    threads: ThreadsOption = None,
    *,
    given: Given,
    json: JsonOption = False,
) -> None:
    """Write MODEL's denoiser so that it runs in int8 without Octavo, with scheduler settings and a description.

    One evaluation of what was written is compared with the simulation; docs/export.md has scripts that run it.
    """
    from octavo.diffusion import find_denoiser
    from octavo.diffusion.trajectories.eta import with_eta
    from octavo.errors import OctavoError
    from octavo.places import check_place
    from octavo.quantization import layer_counts
    from octavo.runtimes import export
    from octavo.runtimes.export import STEPS

    if dialect is not DialectChoice.portable and format is FormatChoice.openvino:
        raise OctavoError(f"--dialect: {dialect.value} is for --format onnx; leave it out")
    check_place(out)
    if Path(model).exists() and Path(model).resolve() == out.resolve():
        raise OctavoError(f"--out: {out} is the model itself, which would be replaced; choose another folder")
    if out.is_dir() and any(out.iterdir()) and not (out / "export.json").is_file():
        raise OctavoError(f"--out: {out} holds something else than an export; choose another folder")
    pipeline = load_quietly(model)
    counts = layer_counts(find_denoiser(pipeline)[1])
    if not counts["quantized_layers"]:
        raise OctavoError(f"{model}: has no quantized layers; octavo quantize makes a model that has")
    inputs = given.inputs(pipeline)
    if "eta" in inputs:  # part of what the graph is sampled by
        pipeline = with_eta(pipeline, inputs.pop("eta"))
    written = export(
        pipeline,
        out,
        format.value,
        batch_size=batch_size,
        dialect=dialect.value,
        steps=steps_for(pipeline, steps, default=STEPS),
        inputs=inputs,
    )
    integers, engine = sum(row.ok for row in written.audit), written.engine
    size = sum(file.stat().st_size for file in out.iterdir() if file.suffix != ".json" and file.is_file())
    floats = counts["float_activations"]
    is_portable = format is FormatChoice.onnx and dialect is DialectChoice.portable
    is_short = is_portable and integers < len(written.audit)
    text = "\n".join(
        [
            f"{shlex.quote(str(written.path))}: {size / 1e6:.1f} MB",
            f"{integers} of {len(written.audit)} layers with integer activations run in int8 in {engine} "
            f"on this machine{f'; {floats} more have integer weights alone' if floats else ''}",
            f"one evaluation is {written.distance:.1e} (relative L2) from the simulation",
            *(f"note: {note}" for note in written.notes),
            *(["note: for ONNX Runtime's CPU, --dialect onnxruntime has all in int8"] if is_short else []),
        ]
    )
    figures = {
        "out": str(out),
        "network": written.path.name,
        "bytes": size,
        "engine": engine,
        **counts,
        "audited": len(written.audit),
        "in_int8": integers,
        "distance_to_simulation": written.distance,
        "notes": written.notes,
    }
    print_figures(figures, json, text)

"""`octavo audit`: which kernel, in which precision, really runs each layer that is to run in integers."""

from __future__ import annotations

from typing import Annotated

import typer

from octavo.cli.inputs import Given, takes_inputs
from octavo.cli.shared import (
    BatchSizeOption,
    JsonOption,
    ModelArgument,
    PrecisionChoice,
    PrecisionOption,
    Runtime,
    RuntimeOption,
    ThreadsOption,
    load_quietly,
    print_figures,
)


@takes_inputs
def command(
    model: ModelArgument,
    batch_size: BatchSizeOption = 1,
    runtime: RuntimeOption = Runtime.openvino,
    precision: PrecisionOption = PrecisionChoice.auto,
    threads: ThreadsOption = None,
    layers: Annotated[bool, typer.Option(help="List every layer, not only the sum.")] = True,
    *,
    given: Given,
    json: JsonOption = False,
) -> None:
    """Compile MODEL and list every layer with integer activations and the kernel that runs it; exit code 2 if one is
    not in int8. Layers whose weights alone are integers are counted.

    Of a full-precision MODEL, the names of its layers are listed, as the patterns of `octavo quantize` match them, and
    the exit code is 2.
    """
    from octavo.calibration.components import part_prefix, parts_of, quantized_parts
    from octavo.diffusion import find_denoiser
    from octavo.errors import OctavoError
    from octavo.quantization import layer_counts, quantized_layers, walk
    from octavo.runtimes import accelerate, audit, require_integers

    loaded = load_quietly(model)
    inputs = given.inputs(loaded)
    _, denoiser = find_denoiser(loaded)
    if not any(True for _ in quantized_layers(denoiser)):
        names = [name for name, _ in walk(denoiser)]
        further = [
            f"{component}.{part_prefix(component)}{name}"
            for component, part in parts_of(loaded)
            for name, _ in walk(part)
        ]
        figures = {**layer_counts(), "audited": 0, "in_int8": 0, "layers": [], "float_layers": names}
        text = [*(names if layers else []), f"{len(names)} layers in float"]
        if further:
            figures["further_float_layers"] = further
            text += [*(further if layers else []), f"{len(further)} more layers, with --components"]
        print_figures(figures, json, "\n".join(text))
        raise OctavoError(f"{model}: has no quantized layers; octavo quantize makes a model that has")
    pipeline = accelerate(
        loaded,
        runtime.value,
        precision=precision.value,
        batch_size=batch_size,
        inputs=inputs,
        on_fallback="warn",
    )
    rows = audit(pipeline)
    integers = sum(row.ok for row in rows)
    width = max((len(row.layer) for row in rows), default=0)
    twice = sum(row.kernels > 1 for row in rows)
    lines = [
        f"{row.layer:<{width}}  {row.precision:<8} {row.kernel}{' x 2' if row.kernels > 1 else ''}"
        for row in rows
        if layers
    ]
    share = 100 * integers / max(1, len(rows))
    summary = f"{integers} of {len(rows)} layers with integer activations run in int8 ({share:.1f} %)"
    if twice:
        summary += f", {twice} of them in two kernels (this CPU has no VNNI; with --pair-limit, or 7-bit weights, one)"
    counts = layer_counts(denoiser, *(part for _, part in quantized_parts(loaded)))
    if counts["float_activations"]:
        summary += f"; {counts['float_activations']} more have integer weights alone"
    figures = {
        **counts,
        "audited": len(rows),
        "in_int8": integers,
        "in_two_kernels": twice,
        "layers": [row.to_dict() for row in rows],
    }
    print_figures(figures, json, "\n".join([*lines, summary]))
    require_integers(rows)

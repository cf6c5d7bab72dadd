"""`octavo audit`: which kernel, in which precision, really runs each quantized layer."""

from __future__ import annotations

from typing import Annotated

import typer

from octavo.cli.shared import (
    BatchSizeOption,
    ClassLabelsOption,
    JsonOption,
    ModelArgument,
    PrecisionChoice,
    PrecisionOption,
    PromptOption,
    inputs_of,
    load_quietly,
    print_figures,
)


def command(
    model: ModelArgument,
    batch_size: BatchSizeOption = 1,
    precision: PrecisionOption = PrecisionChoice.auto,
    layers: Annotated[bool, typer.Option(help="List every layer, not only the sum.")] = True,
    prompt: PromptOption = None,
    class_labels: ClassLabelsOption = None,
    json: JsonOption = False,
) -> None:
    """Compile MODEL and list every quantized layer with the kernel that runs it; exit code 2 if one is not in int8."""
    from octavo.errors import OctavoError
    from octavo.runtimes import accelerate, audit, require_integers

    pipeline = accelerate(
        load_quietly(model),
        precision=precision.value,
        batch_size=batch_size,
        inputs=inputs_of(prompt, class_labels),
        on_fallback="warn",
    )
    rows = audit(pipeline)
    if not rows:
        raise OctavoError(f"{model}: has no quantized layers; octavo quantize makes a model that has")
    integers = sum(row.ok for row in rows)
    width = max(len(row.layer) for row in rows)
    lines = [f"{row.layer:<{width}}  {row.precision:<8} {row.kernel}" for row in rows] if layers else []
    summary = f"{integers} of {len(rows)} quantized layers run in int8 ({100 * integers / len(rows):.1f} %)"
    figures = {"quantized_layers": len(rows), "in_int8": integers, "layers": [row.to_dict() for row in rows]}
    print_figures(figures, json, "\n".join([*lines, summary]))
    require_integers(rows)

"""`octavo bench`: ours and torch eager, in turn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.cli.shared import (
    BatchSizeOption,
    ClassLabelsOption,
    JsonOption,
    ModelArgument,
    PrecisionChoice,
    PrecisionOption,
    PromptOption,
    ThreadsOption,
    inputs_of,
    load_quietly,
    print_figures,
    steps_for,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

BASELINE = "torch eager fp32"
OURS = "octavo int8"


def command(
    model: ModelArgument,
    batch_size: BatchSizeOption = 8,
    rounds: Annotated[int, typer.Option(min=3, help="Rounds; each engine runs once a round.")] = 15,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampler steps (default: 10, or the trajectory's).")
    ] = None,
    precision: PrecisionOption = PrecisionChoice.auto,
    threads: ThreadsOption = None,
    prompt: PromptOption = None,
    class_labels: ClassLabelsOption = None,
    json: JsonOption = False,
) -> None:
    """Time MODEL in int8 against torch eager fp32 and bf16, in turn in one process.

    First one evaluation of the denoiser, then whole images (--steps sampler steps). A full-precision MODEL is
    quantized first, on a few calibration pairs: enough for its speed, not for its quality.
    """
    import platform

    import torch

    from octavo.diffusion import call_pipeline, find_denoiser, first_call, generators
    from octavo.evaluation.speed import format_table, table, take_turns
    from octavo.runtimes import accelerate, audit, executor_of, require_integers

    inputs = inputs_of(prompt, class_labels)
    pipeline = load_quietly(model)
    steps = steps_for(pipeline, steps, default=10)
    quantized, reference = _quantized_and_float(pipeline, inputs)
    ours = accelerate(quantized, precision=precision.value, batch_size=batch_size, inputs=inputs)
    require_integers(audit(ours))
    in_bf16 = _bf16_copy(reference)
    args, kwargs = first_call(reference, batch_size=batch_size, inputs=inputs)

    def evaluation(pipeline: DiffusionPipeline) -> Any:
        _, denoiser = find_denoiser(pipeline)
        own_args, own_kwargs = (args, kwargs) if pipeline is not in_bf16 else _to_bf16((args, kwargs))
        return lambda: denoiser(*own_args, **own_kwargs)

    def images(pipeline: DiffusionPipeline) -> Any:
        return lambda: call_pipeline(
            pipeline,
            generators=generators(0, 0, batch_size),
            num_inference_steps=steps,
            inputs=inputs,
            output_type="pt",  # numpy has no bf16
        )

    with torch.inference_mode():
        tables = {}
        for unit, engine, count in (
            ("evaluation", evaluation, rounds),
            ("image", images, max(3, rounds // 3)),
        ):
            engines = {
                BASELINE: engine(reference),
                "torch eager bf16": engine(in_bf16),
                OURS: engine(ours),
            }
            timings = take_turns(engines, rounds=count)
            tables[unit] = table(timings, BASELINE, per=batch_size if unit == "image" else 1)
    executor = executor_of(ours)
    remainder = sorted({graph.precision for graph in executor.graphs.values()}) if executor else []
    figures = {
        "model": model,
        "batch_size": batch_size,
        "steps": steps,
        "remainder_precision": remainder,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "evaluation": tables["evaluation"],
        "image": tables["image"],
    }
    text = "\n\n".join(
        f"one {unit}, batch {batch_size}{f', {steps} steps' if unit == 'image' else ''}"
        f" (int8 remainder {', '.join(remainder)})\n{format_table(rows, unit, BASELINE)}"
        for unit, rows in tables.items()
    )
    print_figures(figures, json, text)


def _quantized_and_float(
    pipeline: DiffusionPipeline, inputs: dict[str, Any]
) -> tuple[DiffusionPipeline, DiffusionPipeline]:
    from octavo.api import quantize
    from octavo.calibration import PTQ4DM, with_denoiser
    from octavo.diffusion import find_denoiser
    from octavo.quantization import dequantized, quantized_layers

    component, denoiser = find_denoiser(pipeline)
    if any(True for _ in quantized_layers(denoiser)):
        return pipeline, with_denoiser(pipeline, component, dequantized(denoiser))
    quick = PTQ4DM(samples=8, steps=4, metric="minmax")
    return quantize(pipeline, quick, batch_size=8, inputs=inputs, progress=False), pipeline


def _bf16_copy(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    import copy

    import torch
    from torch import nn

    other = copy.deepcopy(pipeline)
    for module in other.components.values():
        if isinstance(module, nn.Module):
            nn.Module.to(module, torch.bfloat16)  # diffusers' own refuses a network that was loaded quantized
    return other


def _to_bf16(value: Any) -> Any:
    """The same arguments with every float tensor in bfloat16, as a network of that type takes them."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(torch.bfloat16) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_to_bf16(item) for item in value)
    if isinstance(value, dict):
        return {key: _to_bf16(item) for key, item in value.items()}
    return value

"""`octavo bench`: ours and others, in turn."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.cli.inputs import Given, takes_inputs
from octavo.cli.shared import (
    BatchSizeOption,
    JsonOption,
    PrecisionChoice,
    PrecisionOption,
    ThreadsOption,
    load_quietly,
    print_figures,
    steps_for,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

OURS = "octavo int8"
MIN_CALIBRATION = 2


@takes_inputs
def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A pipeline folder, a hub id, 'digits' (bundled), or an architecture with random weights: "
            "ddpm-cifar10, dit-s-2, sd15, sdxl.",
        ),
    ],
    batch_size: BatchSizeOption = 8,
    rounds: Annotated[int, typer.Option(min=3, help="Rounds; each engine runs once a round.")] = 15,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampler steps (default: 10, or the trajectory's).")
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            help="all, or names or their beginnings: torch, torch.compile, torchao, openvino, nncf, onnxruntime "
            "(default: torch eager fp32 and bf16). What is not installed is named and skipped."
        ),
    ] = None,
    precision: PrecisionOption = PrecisionChoice.auto,
    threads: ThreadsOption = None,
    *,
    given: Given,
    json: JsonOption = False,
) -> None:
    """Time MODEL in int8 against torch eager fp32 and others, in turn in one process.

    First one evaluation of the denoiser, with its distance from fp32 and its share of the machine's int8 peak; then,
    unless --peers is given, whole images (--steps sampler steps). A full-precision MODEL is quantized first, on a few
    calibration pairs: enough for its speed, not for its quality.
    """
    import torch

    from octavo.diffusion import call_pipeline, find_denoiser, first_call, generators
    from octavo.evaluation.machine import machine
    from octavo.evaluation.peers import Task, build, chosen
    from octavo.evaluation.peers.choose import BASELINE, DEFAULT
    from octavo.evaluation.speed import format_table, table, take_turns
    from octavo.runtimes import accelerate, audit, executor_of, require_integers

    names = chosen(peers)
    pipeline = _pipeline(model)
    inputs = given.inputs(pipeline)
    steps = steps_for(pipeline, steps, default=10)
    quantized, reference = _quantized_and_float(pipeline, inputs)
    ours = accelerate(quantized, precision=precision.value, batch_size=batch_size, inputs=inputs)
    require_integers(audit(ours))
    _, kwargs = first_call(reference, batch_size=batch_size, inputs=inputs)
    denoiser, own = find_denoiser(reference)[1], find_denoiser(ours)[1]
    task = Task(denoiser, kwargs, [kwargs] * MIN_CALIBRATION, threads)
    tables, texts = {}, []
    with torch.inference_mode():
        engines, skipped = build(names, task, lambda name: print(f"preparing {name}", file=sys.stderr))
        engines[OURS] = lambda: own(**kwargs)
        timings = take_turns(engines, rounds=rounds)
        rows = table(timings, BASELINE)
        distances = _distances(engines, BASELINE)
        roofline = _roofline(reference, inputs, batch_size, timings[OURS].seconds, threads)
        for row in rows:
            row["relative_error"] = distances[str(row["engine"])]
        tables["evaluation"] = rows
        if names == DEFAULT:
            sampled = {BASELINE: reference, DEFAULT[1]: _bf16_copy(reference), OURS: ours}
            timings = take_turns(
                {
                    name: functools.partial(
                        call_pipeline,
                        sampled[name],
                        generators=generators(0, 0, batch_size),
                        num_inference_steps=steps,
                        inputs=inputs,
                        output_type="pt",  # numpy has no bf16
                    )
                    for name in sampled
                },
                rounds=max(3, rounds // 3),
            )
            tables["image"] = table(timings, BASELINE, per=batch_size)
    executor = executor_of(ours)
    remainder = sorted({graph.precision for graph in executor.graphs.values()}) if executor else []
    for unit, rows in tables.items():
        made = f", {steps} steps" if unit == "image" else ""
        texts.append(
            f"one {unit}, batch {batch_size}{made} (int8 remainder {', '.join(remainder)})\n"
            f"{format_table(rows, unit, BASELINE)}"
        )
    texts.append(
        "relative L2 distance of one evaluation from fp32: "
        + ", ".join(f"{name} {distance:.2g}" for name, distance in distances.items() if name != BASELINE)
    )
    texts.append(
        f"{OURS}: {roofline['macs'] / 1e9:.2f} G multiply-adds an evaluation, {roofline['share']:.0%} of the int8 peak "
        f"of {roofline['peak'] / 1e9:.0f} G a second"
    )
    texts += [f"skipped: {name} ({why})" for name, why in skipped.items()]
    figures = {
        "model": model,
        "batch_size": batch_size,
        "steps": steps,
        "remainder_precision": remainder,
        "threads": torch.get_num_threads(),
        "machine": machine(),
        **tables,
        "roofline": roofline,
        "skipped": skipped,
    }
    print_figures(figures, json, "\n\n".join(texts))


def _pipeline(model: str) -> DiffusionPipeline:
    from octavo.evaluation.peers.architectures import ARCHITECTURES, architecture

    return architecture(model) if model in ARCHITECTURES else load_quietly(model)


def _distances(engines: dict[str, Any], baseline: str) -> dict[str, float]:
    """||y - y_fp32|| / ||y_fp32|| of each engine's output, on the input that is timed."""
    outputs = {name: _first(run()) for name, run in engines.items()}
    exact = outputs[baseline]
    return {name: float((output - exact).norm() / exact.norm()) for name, output in outputs.items()}


def _first(output: Any) -> Any:
    """The first tensor of whatever an engine returns, float64."""
    import torch

    while not hasattr(output, "dtype"):
        output = next(iter(output.values())) if hasattr(output, "values") else output[0]
    return torch.as_tensor(output).double()


def _roofline(
    reference: DiffusionPipeline,
    inputs: dict[str, Any],
    batch_size: int,
    seconds: list[float],
    threads: int | None,
) -> dict[str, float]:
    from octavo.evaluation.cost import static_cost
    from octavo.evaluation.roofline import int8_peak, share_of_peak

    macs, peak = static_cost(reference, inputs).macs * batch_size, int8_peak(threads)
    return {"macs": macs, "peak": peak, "share": share_of_peak(macs, seconds, peak)}


def _quantized_and_float(
    pipeline: DiffusionPipeline, inputs: dict[str, Any]
) -> tuple[DiffusionPipeline, DiffusionPipeline]:
    from octavo.api import quantize
    from octavo.calibration import PTQ4DM
    from octavo.calibration.components import in_float
    from octavo.diffusion import find_denoiser
    from octavo.quantization import quantized_layers

    if any(True for _ in quantized_layers(find_denoiser(pipeline)[1])):
        return pipeline, in_float(pipeline)
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

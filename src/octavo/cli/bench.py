"""`octavo bench`: ours and others, in turn."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.cli.bench_images import bf16_copy, image_rows, images, why_not
from octavo.cli.bench_models import (
    BEST,
    IMAGES,
    OWN,
    can_afford_best,
    compared,
    few_steps,
    quantized_by,
)
from octavo.cli.inputs import Given, takes_inputs
from octavo.cli.shared import (
    BatchSizeOption,
    JsonOption,
    PrecisionChoice,
    PrecisionOption,
    ThreadsOption,
    check_given_model,
    print_figures,
    steps_for,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

OURS = "octavo int8"
ARCHITECTURES = ("ddpm-cifar10", "dit-s-2", "sd15", "sdxl")
"""Names for networks with random weights, whatever lies in a folder of such a name."""


def _check_model(name: str | None) -> str | None:
    return name if name in ARCHITECTURES else check_given_model(name)


@takes_inputs
def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A pipeline folder, a hub id, 'digits' (bundled), or an architecture with random weights: "
            f"{', '.join(ARCHITECTURES)}.",
            callback=_check_model,
        ),
    ] = "digits",
    batch_size: BatchSizeOption = 8,
    rounds: Annotated[int, typer.Option(min=3, help="Rounds; each engine runs once a round.")] = 15,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampler steps (default: 10, or the trajectory's).")
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            help="all, or names or their beginnings: torch, torch.compile, torchao, openvino, nncf, onnxruntime "
            "(default: torch eager fp32 and bf16). What is not installed, or has not the memory or the bf16 that it "
            "needs, is named and left out."
        ),
    ] = None,
    precision: PrecisionOption = PrecisionChoice.auto,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="ptq4dm, best or w4a8: how a full-precision MODEL is quantized (default: best; above 100 million "
            "parameters best without GPTQ and float activations: about as fast, less exact)."
        ),
    ] = None,
    pair_limit: Annotated[
        bool,
        typer.Option(
            "--pair-limit",
            help="Quantize a full-precision MODEL so that a layer takes one kernel on CPUs without VNNI too.",
        ),
    ] = False,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The full precision of a MODEL that is quantized already (default: its own weights in float, so that "
            "what rounding them costs is in no PSNR).",
            callback=_check_model,
        ),
    ] = None,
    threads: ThreadsOption = None,
    *,
    given: Given,
    json: JsonOption = False,
) -> None:
    """Time MODEL in int8 against torch eager fp32 and others, in turn in one process, each with its PSNR to fp32.

    First one evaluation of the denoiser, with its share of the machine's int8 peak; then, unless --peers is given,
    whole images (--steps sampler steps). A full-precision MODEL is quantized first, on the calls of 4 steps of 8
    images, and so are its peers, on such calls of their own; the call that is timed and judged is none of them.
    """
    import torch

    from octavo.diffusion import find_denoiser, first_call
    from octavo.diffusion.run import check_number_of_steps
    from octavo.errors import OctavoError
    from octavo.evaluation.machine import machine
    from octavo.evaluation.peers import Task, build, chosen
    from octavo.evaluation.peers.calibration import calibration_calls
    from octavo.evaluation.peers.choose import BASELINE, DEFAULT
    from octavo.evaluation.peers.fidelity import below_best, fidelity, keeping
    from octavo.evaluation.peers.task import Engine, OnThreads, threads_of
    from octavo.evaluation.speed import format_table, table, take_turns
    from octavo.runtimes import accelerate, audit, executor_of, require_integers
    from octavo.runtimes.core import openvino_core
    from octavo.runtimes.precision import has_bf16

    names = chosen(peers)
    if steps is not None and names != DEFAULT:
        raise OctavoError(
            "--steps: is of whole images, and with --peers evaluations alone are timed; leave it out"
        )
    both = compared(model, reference, recipe, given.inputs, pair_limit)
    inputs = given.inputs(both.reference)
    steps = steps_for(both.quantized, steps, default=10)
    if names == DEFAULT:
        check_number_of_steps(both.quantized, steps)  # before anything is compiled
    ours = accelerate(both.quantized, precision=precision.value, batch_size=batch_size, inputs=inputs)
    require_integers(audit(ours))
    executor = executor_of(ours)
    _, kwargs = first_call(both.reference, batch_size=batch_size, inputs=inputs)
    denoiser, own = find_denoiser(both.reference)[1], find_denoiser(ours)[1]
    few = {"images": IMAGES, "batch_size": batch_size, "steps": few_steps(both.reference)}
    calls = [] if names == DEFAULT else calibration_calls(both.reference, inputs=inputs, **few)
    task = Task(denoiser, kwargs, calls, threads)
    name_of_ours = f"{OURS}, {both.recipe}"
    tables, texts = {}, []
    with torch.inference_mode():
        built = build(names, task, lambda name: print(f"preparing {name}", file=sys.stderr))
        engines: dict[str, Engine] = {
            **built.engines,
            name_of_ours: OnThreads(lambda: own(**kwargs), _threads(executor)),
        }
        timed, outputs = keeping(engines)
        timings = take_turns(timed, rounds=rounds)
        found = fidelity(outputs, BASELINE)
        tables["evaluation"] = [
            {**row, **found[str(row["engine"])], "threads": threads_of(engines[str(row["engine"])])}
            for row in table(timings, BASELINE)
        ]
        roofline = _roofline(both.reference, inputs, batch_size, timings[name_of_ours].seconds, threads)
        if names == DEFAULT:
            sampled = {BASELINE: both.reference, DEFAULT[1]: bf16_copy(both.reference), name_of_ours: ours}
            if why := why_not(functools.partial(images, sampled[DEFAULT[1]], inputs, batch_size, steps)):
                del sampled[DEFAULT[1]]
                built.failed[f"{DEFAULT[1]}, whole images"] = why
            tables["image"] = image_rows(sampled, inputs, batch_size, steps, max(3, rounds // 3))
    best = found[name_of_ours]["psnr"] if both.is_best else None
    if can_afford_best(both):
        settings: dict[str, Any] = {
            "precision": precision.value,
            "batch_size": batch_size,
            "inputs": inputs,
        }
        judge = find_denoiser(accelerate(quantized_by(BEST, both.reference, inputs), **settings))[1]
        best = fidelity({BASELINE: outputs[BASELINE], BEST: judge(**kwargs)}, BASELINE)[BEST]["psnr"]
    remainder = sorted({graph.precision for graph in executor.graphs.values()}) if executor else []
    for unit, rows in tables.items():
        of_what = (
            f"one {unit}, batch {batch_size}" if unit != "image" else f"{batch_size} images, {steps} steps"
        )
        texts.append(
            f"{of_what} (int8 remainder {', '.join(remainder)})\n{format_table(rows, unit, BASELINE)}"
        )
    ruled = below_best(tables["evaluation"][-1]["psnr"], best)
    texts.append(f"{_of_what(both.reference_is)}\n{_rule(ruled, name_of_ours, both.is_best)}")
    texts.append(
        f"{OURS}: {roofline['macs'] / 1e9:.2f} G multiply-adds an evaluation, {roofline['share']:.0%} of the int8 peak "
        f"of {roofline['peak'] / 1e9:.0f} G a second"
    )
    torch_in_bf16 = any(name.startswith("torch") and "bf16" in name for name in built.engines)
    if torch_in_bf16 and not has_bf16(openvino_core()):
        texts.append("torch emulates bf16 on this CPU, which has none")
    texts += [f"left out: {name} ({how})" for name, how in built.missing.items()]
    texts += [f"FAILED: {name} ({why})" for name, why in built.failed.items()]
    figures = {
        "model": model,
        "recipe": both.recipe,
        "reference": reference if both.reference_is == "--reference" else both.reference_is,
        "batch_size": batch_size,
        "steps": steps if "image" in tables else None,
        "calibration": None if both.recipe == OWN and names == DEFAULT else few,
        "remainder_precision": remainder,
        "threads": torch.get_num_threads(),
        "machine": machine(),
        **tables,
        "best": ruled,
        "roofline": roofline,
        "missing": built.missing,
        "failed": built.failed,
    }
    print_figures(figures, json, "\n\n".join(texts))


def _of_what(reference: str) -> str:
    what = {
        "MODEL": "PSNR: to torch fp32",
        "--reference": "PSNR: to torch fp32 of --reference",
        "dequantized": "PSNR: to MODEL's own quantized weights in float, NOT to the model that it was made of: what "
        "rounding the weights costs is not in it (--reference MODEL)",
    }[reference]
    return f"{what}, on the same inputs; of an evaluation the peak is the range of fp32's output"


def _rule(ruled: dict[str, Any], name: str, is_best: bool) -> str:
    allowed = f"at most {ruled['allowed']} dB for speed"
    if is_best:
        return f"{name}: is `best` itself"
    if ruled["below"] is None:
        return (
            f"{name}: how far below `best` is not known, {allowed} is the rule (octavo bench of the model in full "
            "precision measures it)"
        )
    verdict = "within" if ruled["holds"] else "NOT within"
    return f"{name}: {ruled['below']:.2f} dB below `best`, which has {ruled['psnr']:.2f}: {verdict} {allowed}"


def _threads(executor: Any) -> int:
    """Those of OpenVINO under our network."""
    graph = next(iter(executor.graphs.values()))
    return int(graph.streams.compiled.get_property("INFERENCE_NUM_THREADS"))


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

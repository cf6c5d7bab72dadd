"""Gather what a report shows: sample, compare, time, audit, and look into the layers."""

from __future__ import annotations

import copy
import datetime
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from octavo.calibration.components import in_float
from octavo.checkpoint import float32_bytes, tensor_bytes
from octavo.diffusion import find_denoiser, probe
from octavo.diffusion.exchange import exchange_scheduler, same_scheduler
from octavo.diffusion.trajectories import steps_of
from octavo.errors import OctavoError
from octavo.evaluation.activation_ranges import activation_ranges, layers_worth_showing
from octavo.evaluation.compare import FEWEST, Comparison, compare
from octavo.evaluation.cost import MODEL
from octavo.evaluation.features import load_features, real_statistics
from octavo.evaluation.generate import Images, check_makes_images, generate, to_uint8
from octavo.evaluation.intervals import mean_estimate
from octavo.evaluation.layer_error import layer_errors
from octavo.evaluation.similarity import psnr
from octavo.evaluation.speed import take_turns
from octavo.evaluation.trajectory import trajectory
from octavo.fingerprint import versions
from octavo.quantization import quantized_layers, walk
from octavo.report.convert import error_map, figures_of, interval, range_over_time, same_seed_figures
from octavo.report.cost import measure_costs
from octavo.report.data import Interval, ReportData, Row, TradeOffPoint, Verdict
from octavo.report.origin import calibration_steps, loading_code, recipe_of
from octavo.report.pictures import MOST_DECIBELS, gallery
from octavo.runtimes import accelerate, audit, executor_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from octavo.runtimes.openvino import Precision

FULL_PRECISION, OURS, SIMULATION = "torch eager fp32", "Octavo int8", "simulation in torch"
TRAJECTORY_IMAGES = 4
OWN_WEIGHTS = (
    "No full-precision model was given: the reference is this model's own weights in float, so the error of rounding "
    "the weights is not seen. Give the original with --reference."
)


def gather_report(
    quantized: DiffusionPipeline,
    reference: DiffusionPipeline | None = None,
    *,
    title: str = "",
    made_by: str = "",
    num_images: int = 64,
    steps: int = 50,
    seed: int = 0,
    batch_size: int = 16,
    runtime: Literal["openvino", "onnx", "torch-cuda", "torch"] = "openvino",
    precision: Precision = "auto",
    features: str | None = None,
    inputs: Mapping[str, Any] | None = None,
    rounds: int = 9,
    sampled: tuple[Images, Images] | None = None,
    study: Row | None = None,
    progress: bool = True,
) -> ReportData:
    """Measure a quantized pipeline against its full-precision original.

    `title` is the model's name, best that of its folder; `made_by` the command that makes the folder, where it is not
    there yet.

    Image k of both starts from seed + k. The quantized one runs in int8 (by OpenVINO or ONNX Runtime, audited) or in
    its simulation ("torch"), which has no speed to show. Network evaluations are timed in turn, `rounds` times each;
    whole images at a fifth, a half and all of `steps` (a trajectory: all), twice. Peak memory is that of fresh
    processes, which load copies saved in a temporary folder. Layers are compared along one trajectory of 4 images, at
    no more than 50 of its steps. `features`: whose distances are shown besides PSNR and SSIM, "auto" the digits' where
    the images are 16 x 16 and grey, and at least 8; see `octavo.evaluation.features`. `sampled`: images that are made
    already with these settings, float [N, H, W, C], the quantized pipeline's and the reference's. Without
    `reference`, this model's own weights in float stand for it, and the page says so. Neither pipeline is changed.

    Raises `OctavoError` if `quantized` has no quantized layers, or the two models do not belong together.
    """
    check_makes_images(quantized)
    component, network = find_denoiser(quantized)
    if executor_of(quantized) is not None:
        raise OctavoError("quantized: is accelerated already; give it as it was loaded")
    if not any(True for _ in quantized_layers(network)):
        raise OctavoError("quantized: has no quantized layers; octavo.quantize makes a model that has")
    notes = [] if reference is not None else [OWN_WEIGHTS]
    original = reference or in_float(quantized)
    if not same_scheduler(quantized, original):
        own = type(original.scheduler).__name__
        original = exchange_scheduler(original, copy.deepcopy(quantized.scheduler))
        notes.append(
            f"Both models sample by the quantized one's {type(quantized.scheduler).__name__}; the full-precision one's "
            f"own is {own}, or has other settings."
        )
    batch_size = min(batch_size, num_images)
    shared: dict[str, Any] = {"steps": steps, "seed": seed, "inputs": inputs, "progress": progress}
    ours = (
        quantized
        if runtime == "torch"
        else accelerate(quantized, runtime, precision=precision, batch_size=batch_size, inputs=inputs)
    )
    if sampled is None:
        theirs = generate(original, num_images, batch_size=batch_size, label="full precision", **shared)
        images = generate(ours, num_images, batch_size=batch_size, label="quantized", **shared)
    else:
        images, theirs = sampled
    if theirs.shape != images.shape:
        raise OctavoError("reference: its images are of another size; give the model that was quantized")
    comparison = _compare(images, theirs, features, seed)
    along = trajectory(original, num_images=TRAJECTORY_IMAGES, steps=steps, seed=seed, inputs=inputs)
    _, float_network = find_denoiser(original)
    errors = layer_errors(network, float_network, along)
    ranges = activation_ranges(network, float_network, along)
    shown = layers_worth_showing(ranges, [errors.layers[i] for i in errors.worst()])
    recipe, how_calibrated = recipe_of(network)
    rows = audit(ours)
    ours_by_name = dict(quantized_layers(network))
    decibels = np.minimum(psnr(images, theirs), MOST_DECIBELS)
    costs = measure_costs(
        quantized,
        ours,
        original,
        batch_size=batch_size,
        inputs=inputs,
        rounds=rounds,
        own_reference=reference is not None,
    )
    return ReportData(
        title=title or type(quantized).__name__,
        made=_made(component, quantized, num_images, steps, seed, batch_size, ours),
        verdict=Verdict(
            size_bytes=tensor_bytes(network),
            float_bytes=float32_bytes(network),
            psnr=interval(mean_estimate(decibels)),
            num_images=num_images,
            speed=_speed(costs[MODEL].latency, rounds),
            baseline=FULL_PRECISION,
            batch_size=batch_size,
            p_value=comparison.p_same if comparison else None,
        ),
        cost={name: cost.as_json() for name, cost in costs.items()},
        gallery=gallery(images, theirs, seed),
        figures=figures_of(comparison) if comparison else same_seed_figures(images, theirs),
        figure_notes=list(comparison.notes) if comparison else [],
        notes=notes,
        trade_off=_trade_off(original, ours, shared, num_images, batch_size) if runtime != "torch" else [],
        errors=error_map(errors),
        ranges=[range_over_time(found) for found in ranges if found.layer in shown],
        calibration=calibration_steps(quantized, recipe, how_calibrated, inputs),
        audit=[row.to_dict() for row in rows],
        float_layers=[name for name, _ in walk(network) if name not in ours_by_name],
        weights_alone=[name for name, layer in ours_by_name.items() if layer.input_spec.is_float],
        recipe=recipe,
        how_calibrated=how_calibrated,
        loading=loading_code(type(quantized).__name__, title or "FOLDER", made_by),
        study=study,
    )


def _compare(images: Images, reference: Images, features: str | None, seed: int) -> Comparison | None:
    if features == "auto":
        suits = images.shape[1:] == (16, 16, 1) and len(images) >= FEWEST
        features = "digits" if suits else None
    if features is None:
        return None
    return compare(
        to_uint8(images),
        to_uint8(reference),
        extractor=load_features(features),
        real=real_statistics(features, images.shape[1:]),
        paired=True,
        floats=images,
        reference_floats=reference,
        seed=seed,
    )


def _speed(latency: Mapping[str, Any] | None, rounds: int) -> Interval | None:
    """How many times faster one evaluation of the network is, with quartiles."""
    if latency is None:
        return None
    ratio, low, high = (float(latency[name]) for name in ("ratio", "ratio_low", "ratio_high"))
    return Interval(ratio, low, high, f"median and quartiles of {rounds} rounds")


def _trade_off(
    reference: DiffusionPipeline,
    ours: DiffusionPipeline,
    shared: Mapping[str, Any],
    num_images: int,
    batch_size: int,
) -> list[TradeOffPoint]:
    """Whole images at fewer and at all steps, both engines in turn, against full precision at all steps."""
    count = max(1, min(batch_size, num_images // 4))
    steps = shared["steps"]
    engines = {FULL_PRECISION: reference, OURS: ours}
    points, truth = [], None
    seen = probe(ours, num_inference_steps=steps, inputs=shared["inputs"])
    made = seen.num_steps / (seen.num_steps + seen.skipped)  # of an image-to-image run not all
    fewer = [max(1, steps // 5), max(1, steps // 2)]
    numbers = {number for number in fewer if steps_of(ours, number) == number and int(number * made) > 0}
    for number in sorted({*numbers, steps}, reverse=True):
        latest: dict[str, Images] = {}

        def sample(engine: str, number: int = number, latest: dict[str, Images] = latest) -> None:
            arguments = {**shared, "steps": number, "batch_size": count, "label": f"{number} steps"}
            latest[engine] = generate(engines[engine], count, **{**arguments, "progress": False})

        if truth is None:
            for pipeline in engines.values():  # graphs for this batch size are compiled outside the clock
                least = min({*numbers, steps})
                generate(
                    pipeline, count, **{**shared, "steps": least, "batch_size": count, "progress": False}
                )
        timings = take_turns(
            {engine: lambda engine=engine: sample(engine) for engine in engines},  # type: ignore[misc]
            rounds=2,
            warm_up=0,
        )
        truth = latest[FULL_PRECISION] if truth is None else truth
        for engine, timing in timings.items():
            decibels = np.minimum(psnr(latest[engine], truth), MOST_DECIBELS)
            seconds = [value / count for value in timing.seconds]
            points.append(
                TradeOffPoint(
                    engine=engine,
                    steps=number,
                    seconds=Interval(
                        timing.median / count, min(seconds), max(seconds), "fastest and slowest of 2 rounds"
                    ),
                    psnr=None if latest[engine] is truth else interval(mean_estimate(decibels)),
                    batch_size=count,
                )
            )
    return points


def _made(
    component: str,
    quantized: DiffusionPipeline,
    num_images: int,
    steps: int,
    seed: int,
    batch_size: int,
    ours: DiffusionPipeline,
) -> Row:
    """When, with what and where the figures were made."""
    executor = executor_of(ours)
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "pipeline": type(quantized).__name__,
        "component": component,
        "scheduler": type(quantized.scheduler).__name__,
        "images": num_images,
        "steps": steps,
        "seed": seed,
        "batch size": batch_size,
        "engine": f"{OURS} ({executor.runtime})" if executor else SIMULATION,
        "float remainder": ", ".join(sorted({graph.precision for graph in executor.graphs.values()}))
        if executor
        else "f32",
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        **versions(
            "octavo",
            "torch",
            "diffusers",
            {"onnx": "onnxruntime", "torch-cuda": "triton"}.get(
                executor.runtime if executor else "", "openvino"
            ),
        ),
    }

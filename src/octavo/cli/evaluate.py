"""`octavo evaluate`: how far a model's images are from its original's, and what each model costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.cli.inputs import Given, takes_inputs
from octavo.cli.shared import (
    MOST_THREADS,
    BatchSizeOption,
    JsonOption,
    PrecisionChoice,
    ReferenceOption,
    ReuseOption,
    Runtime,
    RuntimeOption,
    SchedulerOption,
    SeedOption,
    StepsOrTrajectorysOption,
    TrajectoryOption,
    check_given_model,
    check_precision,
    print_figures,
)

if TYPE_CHECKING:
    from octavo.evaluation.comparison import Comparison

BOTH_FORMS = ("images", "reference_images", "real_images", "features", "same_seeds", "extrapolate", "json")


@takes_inputs
def command(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="A pipeline folder, a hub id, or 'digits'.", callback=check_given_model
        ),
    ] = None,
    reference: ReferenceOption = None,
    num_images: Annotated[int, typer.Option(min=8, help="Images of each model, from the same seeds.")] = 1000,
    steps: StepsOrTrajectorysOption = None,
    trajectory: TrajectoryOption = None,
    scheduler: SchedulerOption = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="digits, inception, an .xml or .onnx network, or none: PSNR, SSIM and costs alone (default: digits "
            "for 16x16 grey, else inception)."
        ),
    ] = None,
    seed: SeedOption = 0,
    batch_size: BatchSizeOption = 16,
    runtime: RuntimeOption = Runtime.openvino,
    reference_runtime: Annotated[Runtime, typer.Option(help="What evaluates the reference.")] = Runtime.torch,
    precision: Annotated[
        PrecisionChoice,
        typer.Option(
            help="Precision of what stays float under openvino. Not auto, as elsewhere: that goes by speed, so two "
            "machines, or two runs, might compare different images."
        ),
    ] = PrecisionChoice.f32,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_THREADS, help="CPU threads of each process (default: all; 1 if launched)."
        ),
    ] = None,
    *,
    given: Given,
    reuse: ReuseOption = None,
    out: Annotated[Path | None, typer.Option(help="Keep images and figures in this folder.")] = None,
    cost: Annotated[bool, typer.Option(help="Measure BOPs, size, latency and memory too.")] = True,
    images: Annotated[
        Path | None, typer.Option(help="Instead of MODEL: an .npz (arr_0 uint8 NHWC) or a folder of images.")
    ] = None,
    reference_images: Annotated[Path | None, typer.Option(help="The images to compare them with.")] = None,
    same_seeds: Annotated[
        bool, typer.Option(help="Image k of --images and of --reference-images are from one seed.")
    ] = False,
    real_images: Annotated[
        Path | None, typer.Option(help="Real images, for distances to them (digits: bundled).")
    ] = None,
    extrapolate: Annotated[
        bool, typer.Option("--fd-infinity", help="Extrapolate Frechet distances to infinitely many images.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Generate images with MODEL and with --reference from the same seeds, and compare them; or compare --images
    with --reference-images, whatever made them.

    Killed and started again with the same arguments, it goes on after the last finished batch. Under
    `accelerate launch` the processes share the work, and the first one prints.
    """
    from octavo.errors import OctavoError
    from octavo.evaluation.features import NO_FEATURES

    if features == NO_FEATURES and extrapolate:
        raise OctavoError("--fd-infinity: is a distance between features; leave out --features none")
    if images or reference_images:
        if not (images and reference_images):
            raise OctavoError(
                "--images, --reference-images: one is missing; give both, or a MODEL and its --reference"
            )
        _refuse_others(context)
        compared = _compare_files(images, reference_images, features, real_images, same_seeds, extrapolate)
        figures: dict[str, Any] = {
            "images": str(images),
            "reference_images": str(reference_images),
            **_said(compared),
        }
        print_figures(figures, json, f"{compared.as_text()}\nverdict: {figures['verdict']}")
        return
    if model is None or reference is None:
        raise OctavoError(
            "--reference: name the full-precision model that MODEL came from, or give --images and --reference-images"
        )
    if same_seeds:
        raise OctavoError(
            "--same-seeds: is for --images; a MODEL and its --reference always share their seeds"
        )
    from octavo.cli.evaluate_models import ModelsJob, evaluate_models

    check_precision(precision, runtime, reference_runtime)

    job = ModelsJob(
        model=model,
        reference=reference,
        num_images=num_images,
        steps=steps,
        scheduler=scheduler,
        trajectory=trajectory,
        reuse=reuse,
        features=features,
        seed=seed,
        batch_size=min(batch_size, num_images),
        runtimes=(runtime.value, reference_runtime.value),
        precision=precision.value,
        threads=threads,
        given=given,
        real_images=real_images,
        extrapolate=extrapolate,
        cost=cost,
        out=out,
    )
    result = evaluate_models(job)
    if result is not None:
        print_figures(result.figures, json, result.text)


def _refuse_others(context: typer.Context) -> None:
    """Raise `OctavoError` for an argument that only generation would heed."""
    from octavo.errors import OctavoError

    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in BOTH_FORMS and source is not None and source.name == "COMMANDLINE":
            shown = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
            raise OctavoError(f"{shown}: says how images are generated; leave it out with --images")


def _compare_files(
    images: Path,
    reference_images: Path,
    features: str | None,
    real_images: Path | None,
    same_seeds: bool,
    extrapolate: bool,
) -> Comparison:
    from octavo.evaluation.compare import compare
    from octavo.evaluation.features import chosen_features, default_features
    from octavo.evaluation.images import read_images
    from octavo.evaluation.real_data import real_data

    arrays = [read_images(path) for path in (images, reference_images)]
    shape = arrays[0].shape[1:]
    spec = features or default_features(shape)
    extractor = chosen_features(spec)
    return compare(
        *arrays,
        extractor=extractor,
        real=real_data(spec, real_images, shape),
        paired=same_seeds,
        extrapolate=extrapolate,
        progress=True,
    )


def _said(compared: Comparison) -> dict[str, Any]:
    from octavo.evaluation.verdict import verdict

    return {"comparison": compared.as_json(), "verdict": verdict(compared)}

"""`octavo report`: one page by which to decide whether to ship a quantized model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.cli.inputs import Given, command_with, takes_inputs
from octavo.cli.shared import (
    BatchSizeOption,
    JsonOption,
    PrecisionChoice,
    PrecisionOption,
    ReferenceOption,
    Runtime,
    RuntimeOption,
    SeedOption,
    StepsOrTrajectorysOption,
    ThreadsOption,
    check_precision,
    load_quietly,
    print_figures,
    steps_for,
)
from octavo.errors import OctavoError
from octavo.named import check_model

if TYPE_CHECKING:
    from octavo.report.data import ReportData


def _check_place(place: str) -> str:
    """`find_parts`' lines, and those of what is no folder, before the command imports what takes seconds."""
    if not Path(place).is_dir():
        check_model(place)
    find_parts(place)
    return place


@takes_inputs
def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="DIR_OR_MODEL",
            help="A quantized pipeline, a full-precision one (it is quantized first), or a folder that holds a "
            "quantized pipeline, a study.json, a tune.json, or all.",
            callback=_check_place,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The page to write, ending in .html.")] = Path("report.html"),
    reference: ReferenceOption = None,
    num_images: Annotated[int, typer.Option(min=2, help="Images of each, from the same seeds.")] = 64,
    steps: StepsOrTrajectorysOption = None,
    seed: SeedOption = 0,
    batch_size: BatchSizeOption = 16,
    runtime: RuntimeOption = Runtime.openvino,
    precision: PrecisionOption = PrecisionChoice.auto,
    threads: ThreadsOption = None,
    features: Annotated[
        str,
        typer.Option(
            help="digits, inception, an .xml or .onnx network, none, or auto (digits for 16x16 grey)."
        ),
    ] = "auto",
    *,
    given: Given,
    json: JsonOption = False,
) -> None:
    """Compare a quantized model with its original and write what was found as one self-contained HTML page.

    Full precision and int8 images from the same seeds, the worst first; size, speed and distance with intervals;
    error by layer and timestep; activation ranges; where calibration looked; the int8 audit; recipe and loading; and
    what `octavo study` and `octavo tune` wrote into the folder.
    """
    from octavo.files import read_json
    from octavo.report import ReportData, check_report_place, front_svg, read_study, save_report, study_report

    check_report_place(out)
    check_precision(precision, runtime)
    place, study_file, tuning_file = find_parts(model)
    study = read_study(study_file) if study_file else None
    tuning = read_json(tuning_file) if tuning_file else None
    if tuning is not None:
        front_svg(tuning)  # refuses what it cannot draw before anything is measured
    if place is None:
        data = study_report(study) if study is not None else ReportData(Path(model).resolve().name, {})
    else:
        data = _measured(
            place,
            reference,
            given,
            lambda steps: command_with(
                given, "quantize", place, "--steps", steps, "--out", f"{Path(place).name}-int8"
            ),
            num_images=num_images,
            steps=steps,
            seed=seed,
            batch_size=batch_size,
            runtime=runtime.value,
            precision=precision.value,
            features=None if features == "none" else features,
            study=study,
        )
    save_report(replace(data, tuning=tuning), out)
    from octavo.report.words import checks, headline

    size = out.stat().st_size
    figures = {"out": str(out), "bytes": size, "verdict": headline(data)}
    said = "\n".join(f"{check['sign']} {check['text']}" for check in checks(data))
    text = f"{figures['verdict']}\n{said}\nlook: {out} ({size / 1e6:.1f} MB, needs no network)"
    print_figures(figures, json, text)


def find_parts(place: str) -> tuple[str | None, Path | None, Path | None]:
    """The pipeline, the study and the tuning that `place` names or holds; None for what it does not hold.

    Raises `OctavoError` for a folder that holds neither, or several pipelines.
    """
    folder, tuning = Path(place), Path(place) / "tune.json"
    if not folder.is_dir():
        return place, None, None
    study = folder / "study.json"
    found = study if study.is_file() else None
    tuned = tuning if tuning.is_file() else None
    if (folder / "model_index.json").is_file():
        return place, found, tuned
    models = sorted(path.parent for path in folder.glob("*/model_index.json"))
    if len(models) > 1:
        raise OctavoError(f"{place}: holds several pipelines; name one, such as {models[0]}")
    if not models and found is None and tuned is None:
        raise OctavoError(
            f"{place}: holds neither a pipeline (model_index.json), a study (study.json) nor a tuning "
            "(tune.json)"
        )
    return (str(models[0]) if models else None), found, tuned


def _measured(
    place: str, reference: str | None, given: Given, made_by: Callable[[int], str], **settings: Any
) -> ReportData:
    """`made_by`: of the steps, the command that makes what is measured, where `place` is in full precision."""
    from octavo.api import quantize
    from octavo.calibration import named_recipe
    from octavo.diffusion import find_denoiser
    from octavo.evaluation.generate import check_makes_images
    from octavo.quantization import quantized_layers
    from octavo.report import gather_report

    pipeline, name = load_quietly(place), Path(place).name
    check_makes_images(pipeline)
    settings["inputs"] = given.inputs(pipeline)
    steps = settings["steps"] = steps_for(pipeline, settings["steps"])
    if any(True for _ in quantized_layers(find_denoiser(pipeline)[1])):
        original = load_quietly(reference) if reference else None
        return gather_report(pipeline, original, title=name, **settings)
    if reference:
        raise OctavoError(
            f"--reference: {place} is in full precision itself; leave it out, or name a quantized model"
        )
    quantized = quantize(
        pipeline,
        named_recipe("best", steps=steps),
        batch_size=settings["batch_size"],
        inputs=settings["inputs"],
    )
    quantized.set_progress_bar_config(disable=True)
    return gather_report(quantized, pipeline, title=f"{name}-int8", made_by=made_by(steps), **settings)

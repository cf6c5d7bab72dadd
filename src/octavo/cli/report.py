"""`octavo report`: one page by which to decide whether to ship a quantized model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.cli.shared import (
    BatchSizeOption,
    ClassLabelsOption,
    JsonOption,
    PrecisionChoice,
    PrecisionOption,
    PromptOption,
    ReferenceOption,
    Runtime,
    RuntimeOption,
    SeedOption,
    StepsOption,
    ThreadsOption,
    inputs_of,
    load_quietly,
    print_figures,
    shown_command,
)

if TYPE_CHECKING:
    from octavo.report.data import ReportData


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="DIR_OR_MODEL",
            help="A quantized pipeline, a full-precision one (it is quantized first), or a folder that holds a "
            "quantized pipeline, a study.json, or both.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The page to write, ending in .html.")] = Path("report.html"),
    reference: ReferenceOption = None,
    num_images: Annotated[int, typer.Option(min=2, help="Images of each, from the same seeds.")] = 64,
    steps: StepsOption = 50,
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
    prompt: PromptOption = None,
    class_labels: ClassLabelsOption = None,
    json: JsonOption = False,
) -> None:
    """Compare a quantized model with its original and write what was found as one self-contained HTML page.

    Full precision and int8 images from the same seeds, the worst first; size, speed and distance with intervals;
    error by layer and timestep; activation ranges; where calibration looked; the int8 audit; recipe and loading.
    """
    from octavo.report import check_report_place, read_study, save_report, study_report

    check_report_place(out)
    place, study_file = find_parts(model)
    study = read_study(study_file) if study_file else None
    if place is None:
        data = study_report(study)
    else:
        made_by = ("quantize", place, "--steps", steps, "--out", f"{Path(place).name}-int8")
        data = _measured(
            place,
            reference,
            shown_command(*made_by, prompt=prompt, class_labels=class_labels),
            num_images=num_images,
            steps=steps,
            seed=seed,
            batch_size=batch_size,
            runtime=runtime.value,
            precision=precision.value,
            features=None if features == "none" else features,
            inputs=inputs_of(prompt, class_labels),
            study=study,
        )
    save_report(data, out)
    from octavo.report.words import checks, headline

    size = out.stat().st_size
    figures = {"out": str(out), "bytes": size, "verdict": headline(data)}
    said = "\n".join(f"{check['sign']} {check['text']}" for check in checks(data))
    text = f"{figures['verdict']}\n{said}\nlook: {out} ({size / 1e6:.1f} MB, needs no network)"
    print_figures(figures, json, text)


def find_parts(place: str) -> tuple[str | None, Path | None]:
    """The pipeline and the study that `place` names or holds; None for what it does not hold.

    Raises `OctavoError` for a folder that holds neither, or several pipelines.
    """
    from octavo.errors import OctavoError

    folder = Path(place)
    if not folder.is_dir():
        return place, None
    study = folder / "study.json"
    found = study if study.is_file() else None
    if (folder / "model_index.json").is_file():
        return place, found
    models = sorted(path.parent for path in folder.glob("*/model_index.json"))
    if len(models) > 1:
        raise OctavoError(f"{place}: holds several pipelines; name one, such as {models[0]}")
    if not models and found is None:
        raise OctavoError(f"{place}: holds neither a pipeline (model_index.json) nor a study (study.json)")
    return (str(models[0]) if models else None), found


def _measured(place: str, reference: str | None, made_by: str, **settings: Any) -> ReportData:
    """`made_by`: the command that makes what is measured, where `place` is in full precision."""
    from octavo.api import quantize
    from octavo.calibration import named_recipe
    from octavo.diffusion import find_denoiser
    from octavo.errors import OctavoError
    from octavo.quantization import quantized_layers
    from octavo.report import gather_report

    pipeline, name = load_quietly(place), Path(place).name
    if any(True for _ in quantized_layers(find_denoiser(pipeline)[1])):
        original = load_quietly(reference) if reference else None
        return gather_report(pipeline, original, title=name, **settings)
    if reference:
        raise OctavoError(
            f"--reference: {place} is in full precision itself; leave it out, or name a quantized model"
        )
    quantized = quantize(
        pipeline,
        named_recipe("best", steps=settings["steps"]),
        batch_size=settings["batch_size"],
        inputs=settings["inputs"],
    )
    quantized.set_progress_bar_config(disable=True)
    return gather_report(quantized, pipeline, title=f"{name}-int8", made_by=made_by, **settings)

"""`octavo study`: the paper's five tables, measured on any full-precision pipeline."""

from __future__ import annotations

import shlex
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from octavo.cli.inputs import Given, takes_inputs
from octavo.cli.shared import (
    JsonOption,
    ModelArgument,
    ThreadsOption,
    load_quietly,
    print_figures,
)


class TableChoice(StrEnum):
    """The paper's tables."""

    T1 = "T1"
    T2 = "T2"
    T3 = "T3"
    T4 = "T4"
    T5 = "T5"


class SamplerChoice(StrEnum):
    """The sampler of every table but T5."""

    ddim = "ddim"
    own = "own"


@takes_inputs
def command(
    model: ModelArgument,
    out: Annotated[
        Path, typer.Option(help="The folder to write into; what is in it already is gone on with.")
    ],
    quick: Annotated[
        bool, typer.Option("--quick", help="Two seeds, fewer rows, images and steps: a first look.")
    ] = False,
    table: Annotated[
        list[TableChoice] | None,
        typer.Option(
            metavar="T1..T5",
            help="T1 operations, T2 calibration source, T3 timesteps, T4 metric, T5 samplers; may be repeated.",
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Calibration seeds of each cell.")] = None,
    num_images: Annotated[int | None, typer.Option(min=8, help="Images sampled for each cell.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampler steps of every table but T5.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, max=1024, help="Calibration pairs.")] = None,
    sampler: Annotated[
        SamplerChoice, typer.Option(help="Of every table but T5: DDIM, or the pipeline's own.")
    ] = SamplerChoice.ddim,
    low_bits: Annotated[
        bool, typer.Option(help="Tables again at lower bit widths (W8A6, W6A6, W4A8).")
    ] = True,
    low_bit_table: Annotated[
        list[TableChoice] | None,
        typer.Option(
            metavar="T1..T5",
            help="Of which tables (default: T1 to T4, since T5's samplers are long); may be repeated.",
        ),
    ] = None,
    features: Annotated[
        str,
        typer.Option(
            help="digits, inception, or an .xml or .onnx network; auto: digits for 16x16 grey, else inception."
        ),
    ] = "auto",
    images: Annotated[
        Path | None, typer.Option(help="Real images (.npz or a folder): T2's x_0, and what FD to real means.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images denoised together.")] = None,
    threads: ThreadsOption = None,
    *,
    given: Given,
    json: JsonOption = False,
) -> None:
    """Measure PTQ4DM's five tables on MODEL, each cell with several calibration seeds and its interval.

    Killed and started again with the same arguments, it goes on after the last finished cell. OUT/study.md is for
    people, OUT/report.html shows it as charts, OUT/study.json is for programs.
    """
    from octavo.evaluation.images import read_images
    from octavo.report import read_study, save_report, study_report
    from octavo.study import QUICK, StudyOptions, run_study

    changes: dict[str, Any] = {
        "tables": tuple(choice.value for choice in dict.fromkeys(table)) if table else None,
        "seeds": seeds,
        "num_images": num_images,
        "steps": steps,
        "samples": samples,
        "batch_size": batch_size,
        "low_bits": None if low_bits else (),
        "low_bit_tables": tuple(choice.value for choice in dict.fromkeys(low_bit_table))
        if low_bit_table
        else None,
    }
    options = replace(
        QUICK if quick else StudyOptions(),
        sampler=sampler.value,
        features=features,
        **{name: value for name, value in changes.items() if value is not None},
    )
    real = None if images is None else read_images(images)
    pipeline = load_quietly(model)
    study = run_study(
        pipeline,
        out,
        options,
        name=model,
        inputs=given.inputs(pipeline),
        images=real,
        command=_command(),
    )
    save_report(study_report(read_study(out / "study.json")), out / "report.html")
    cells = study["cells"]
    measured = f"{cells['done']} cells, {cells['seconds'] / 60:.1f} minutes"
    print_figures(study, json, f"{out / 'study.md'}: {measured}\nlook    {out / 'report.html'}")


def _command() -> str:
    """This command as it was typed, for the page."""
    import sys

    return shlex.join(["octavo", *sys.argv[1:]])

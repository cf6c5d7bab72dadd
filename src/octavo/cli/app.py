"""The commands, gathered."""

from __future__ import annotations

from typing import Annotated

import typer

from octavo import __version__
from octavo.cli import (
    analytic,
    audit,
    bench,
    demo,
    evaluate,
    export,
    quantize,
    report,
    reuse,
    sample,
    sensitivity,
    study,
    trajectory,
    tune,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"octavo {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """8-bit diffusion models, without retraining: calibrate (PTQ4DM), save, run in real int8."""


app.command("quantize", epilog="Example: octavo quantize digits --out digits-int8")(quantize.command)
app.command("sample", epilog="Example: octavo sample digits-int8 --out grid.png --num-images 64")(
    sample.command
)
app.command("audit", epilog="Example: octavo audit digits-int8")(audit.command)
app.command("evaluate", epilog="Example: octavo evaluate digits-int8 --reference digits --num-images 2000")(
    evaluate.command
)
app.command("report", epilog="Example: octavo report digits-int8 --reference digits --out report.html")(
    report.command
)
app.command("sensitivity", epilog="Example: octavo sensitivity digits --budget size=0.2")(sensitivity.command)
app.command("study", epilog="Example: octavo study digits --out study --quick")(study.command)
app.command("reuse", epilog="Example: octavo reuse digits --steps 50 --recompute 15 --out reuse.json")(
    reuse.command
)
app.command("trajectory", epilog="Example: octavo trajectory digits --steps 10 --out trajectory.json")(
    trajectory.command
)
app.command("analytic", epilog="Example: octavo analytic digits-int8 --out digits-analytic")(analytic.command)
app.command("tune", epilog="Example: octavo tune digits --target quality=reference --out tuned")(tune.command)
app.command("bench", epilog="Example: octavo bench digits-int8 --batch-size 8")(bench.command)
app.command(
    "export",
    epilog="Example: octavo export digits-int8 --out digits-openvino --format openvino",
)(export.command)
app.command("demo", epilog="Example: octavo demo --out octavo-demo")(demo.command)

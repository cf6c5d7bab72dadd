"""The command line: `octavo COMMAND`. Exit code 0, 2 with one line that says what to mend, or 130 after Ctrl-C."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer

from octavo.cli.app import app
from octavo.errors import OctavoError
from octavo.places import UNWRITABLE

__all__ = ["app", "main"]

RESUMABLE = ("quantize", "evaluate", "sensitivity", "study", "trajectory", "analytic", "tune")
"""Commands that go on where they were stopped."""
INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it: 128 + SIGINT."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; `arguments` default to the process's own. Exits.

    With OCTAVO_DEBUG set, an error is raised as it is, for its traceback.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(arguments or ["--help"], standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error; typer does not export their base class
            _fail(f"{' '.join(error.format_message().split())} (see {_command(arguments)} --help)")
        if os.environ.get("OCTAVO_DEBUG"):
            raise
        if isinstance(error, OSError) and error.errno in UNWRITABLE and error.filename:
            _fail(f"{error.filename}: {error.strerror}; make room or choose another place")
        _fail(str(error) if isinstance(error, OctavoError) else _one_line(error))
    if code == INTERRUPTED:  # typer's own word for Ctrl-C
        resumes = (
            "; the same command goes on where it stopped"
            if arguments[:1] and arguments[0] in RESUMABLE
            else ""
        )
        _fail(f"interrupted{resumes}", INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _command(arguments: list[str]) -> str:
    """`octavo quantize` for the arguments of quantize, `octavo` where no command is named."""
    names = [command.name for command in app.registered_commands]
    return " ".join(["octavo", *(name for name in arguments[:1] if name in names)])


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{f': {lines[0]}' if lines else ''} (OCTAVO_DEBUG=1 shows where)"


def _fail(message: str, code: int = 2) -> NoReturn:
    print(f"octavo: {message}", file=sys.stderr)
    sys.exit(code)

"""The command line: `octavo COMMAND`. Exit code 0, or 2 with one line that says what to mend."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from octavo.cli.app import app
from octavo.errors import OctavoError

__all__ = ["app", "main"]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; `arguments` default to the process's own. Exits."""
    try:
        code = app(arguments, standalone_mode=False)
    except OctavoError as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; the same command goes on where it stopped")
    except Exception as error:
        if not hasattr(error, "format_message"):  # a usage error; typer does not export their base class
            raise
        _fail(" ".join(error.format_message().split()) + " (see octavo --help)")
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> NoReturn:
    print(f"octavo: {message}", file=sys.stderr)
    sys.exit(2)

"""The command line as a user runs it, in this process."""

from __future__ import annotations

import pytest

from octavo.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """`octavo ARGUMENTS`: exit code, standard output, standard error without progress bars."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    lines = [
        line
        for line in err.replace("\r", "\n").splitlines()
        if line and "it/s" not in line and "|" not in line
    ]
    return int(stop.value.code or 0), out, "\n".join(lines)

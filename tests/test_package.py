"""The package as a whole: what importing it costs, and how it is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points

HEAVY = ("torch", "diffusers", "numpy", "openvino", "matplotlib")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light() -> None:
    loaded = json.loads(run_python("import octavo, json, sys; print(json.dumps(sorted(sys.modules)))"))
    assert "octavo" in loaded
    assert [name for name in HEAVY if name in loaded] == []


def test_import_warns_of_nothing() -> None:
    assert run_python("import warnings; warnings.simplefilter('error'); import octavo") == ""


def test_console_script_is_the_command_line() -> None:
    (script,) = entry_points(group="console_scripts", name="octavo")
    assert script.value == "octavo.cli:main"

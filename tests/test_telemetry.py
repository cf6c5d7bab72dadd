from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
{imports}
import torch
from octavo.runtimes.calls import take_apart
from octavo.runtimes.convert import to_openvino
network = torch.nn.Conv2d(3, 3, 1).eval()
to_openvino(network, take_apart(network.forward, (torch.ones(2, 3, 4, 4),), {{}}))
"""


@pytest.mark.parametrize(("imports", "told"), [("import octavo, openvino", False), ("import openvino", True)])
def test_nothing_is_told_to_google(imports: str, told: bool, tmp_path: Path) -> None:
    """Imported alone OpenVINO tells it, and keeps a number of the user's in the home directory; else this would prove
    nothing. `CI` and the like, by which it is quiet too, are taken out of the environment."""
    environment = {
        name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ
    }
    environment |= {"HOME": str(tmp_path), "OCTAVO_CACHE": str(tmp_path / "cache")}
    run = [sys.executable, "-c", PROGRAM.format(imports=imports)]
    ran = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "intel").exists() is told

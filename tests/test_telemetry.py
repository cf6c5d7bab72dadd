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


SESSION = """
{imports}
import onnxruntime
from onnx import TensorProto, helper
x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "negative", [x], [y])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
"""


@pytest.mark.parametrize(("imports", "told"), [("import octavo, openvino", False), ("import openvino", True)])
def test_nothing_is_told_to_google(imports: str, told: bool, tmp_path: Path) -> None:
    """Imported alone OpenVINO tells it, and keeps a number of the user's in the home directory; else this would prove
    nothing. `CI` and the like, by which it is quiet too, are taken out of the environment."""
    _run(PROGRAM.format(imports=imports), tmp_path)
    assert (tmp_path / "intel").exists() is told


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks where it keeps its number on Linux")
@pytest.mark.parametrize(("imports", "told"), [("import octavo", False), ("", True)])
def test_nothing_is_told_to_microsoft(imports: str, told: bool, tmp_path: Path) -> None:
    """ONNX Runtime alone keeps a number of the machine's, and events until they are sent."""
    pytest.importorskip("onnxruntime")
    _run(SESSION.format(imports=imports), tmp_path)
    assert (tmp_path / ".cache" / "Microsoft").exists() is told


def _run(program: str, home: Path) -> None:
    names = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")
    environment = {name: os.environ[name] for name in names if name in os.environ}
    environment |= {"HOME": str(home), "OCTAVO_CACHE": str(home / "cache")}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr

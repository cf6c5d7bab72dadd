"""The kernels compiled for GPUs, which takes none: what the interpreter cannot show of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed (pip install octavo[cuda])")

import compiled


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """In a process of its own: whether kernels are interpreted is decided when triton is imported."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, "-W", "error", str(Path(compiled.__file__)), "80", "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_every_product_is_an_int8_instruction_of_the_tensor_cores(kernels: list[dict[str, Any]]) -> None:
    names = [kernel["kernel"] for kernel in kernels]
    assert [names.count(f"int8_{what}") for what in ("matmul", "convolution")] == [4, 6]
    assert names.count("quantize_int8") == 10 and "finish_int32" in names
    assert {kernel["capability"] for kernel in kernels} == {80, 90}
    for kernel in kernels:
        if kernel["kernel"].startswith("int8_"):
            assert kernel["products"] and all("s32.s8.s8" in name for name in kernel["products"]), kernel
    large = [kernel for kernel in kernels if kernel["capability"] == 90 and kernel["tile"] == [128, 128]]
    assert large and all("wgmma" in kernel["products"][0] for kernel in large)


def test_nothing_rounds_otherwise_than_in_the_interpreter(kernels: list[dict[str, Any]]) -> None:
    """No product and sum are contracted, 1.5 2^23 is added and taken away, and bfloat16 is rounded to, not cut off."""
    for kernel in kernels:
        assert kernel["contracted"] == 0, kernel
        assert kernel["rounding"] == (kernel["kernel"] == "quantize_int8"), kernel
        if kernel["writes"] == "torch.bfloat16":
            assert kernel["to_bfloat16"] and all(".rn." in name for name in kernel["to_bfloat16"]), kernel

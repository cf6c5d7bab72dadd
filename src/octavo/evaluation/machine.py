"""The machine that figures were taken on: its instructions, its threads, its libraries."""

from __future__ import annotations

import platform
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from octavo.fingerprint import versions
from octavo.runtimes.saturation import adds_in_16_bits

FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")
PACKAGES = ("octavo", "torch", "diffusers", "openvino", "nncf", "onnxruntime", "torchao")


def machine() -> dict[str, Any]:
    """JSON-safe: the processor, its instructions that matter to int8 and bf16, torch's threads, library versions."""
    cpu = Path("/proc/cpuinfo")
    words = cpu.read_text().split() if cpu.exists() else []
    return {
        "processor": _model_name(cpu) or platform.processor() or platform.machine(),
        "cpu_flags": [flag for flag in FLAGS if flag in words],
        "kernels_add_in_16_bits": adds_in_16_bits() if find_spec("openvino") else None,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **versions(*PACKAGES)},
    }


def _model_name(cpu: Path) -> str:
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")

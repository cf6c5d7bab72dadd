"""Where torch-cuda computes: an NVIDIA GPU with int8 tensor cores, or Triton's interpreter for tests."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from octavo.errors import OctavoError

LEAST_CAPABILITY = (8, 0)
"""Ampere. Triton 3.9 compiles no int8 product for 7.5 (Turing), although its tensor cores have one."""


def compute_device(of_network: torch.device) -> torch.device:
    """The GPU that holds the network, else the current one; the CPU where Triton interprets its kernels.

    Raises `OctavoError`, one line with what to do, if Triton or a GPU that serves is missing.
    """
    try:
        importlib.import_module("triton")
    except ImportError as error:
        raise OctavoError(
            f"triton cannot be imported ({error}): pip install -e '.[cuda]' in Octavo's checkout"
        ) from error
    from octavo.runtimes.cuda import launch

    if launch.interpreted():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise OctavoError(
            "runtime: torch-cuda needs an NVIDIA GPU of compute capability 8.0 or more, and torch sees none; install "
            "a CUDA build of torch on a machine that has one, or take the runtime openvino"
        )
    device = of_network if of_network.type == "cuda" else torch.device("cuda", torch.cuda.current_device())
    capability: Any = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        raise OctavoError(
            f"runtime: torch-cuda needs an NVIDIA GPU of compute capability 8.0 or more, and {device} has "
            f"{capability[0]}.{capability[1]}; take another GPU, or the runtime openvino"
        )
    return device

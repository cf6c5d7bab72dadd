"""Peers by name, and those of them that this machine has."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from octavo.errors import OctavoError
from octavo.evaluation.peers import in_engines, in_torch
from octavo.evaluation.peers.task import Engine, Task
from octavo.memory import available
from octavo.runtimes.core import openvino_core
from octavo.runtimes.precision import has_bf16

BASELINE = "torch eager fp32"
DEFAULT = (BASELINE, "torch eager bf16")


@dataclass(frozen=True)
class Peer:
    """How a peer is built from a `Task`, and the packages it needs; whether OpenVINO is asked for bf16.

    takes: about how many times the float32 weights it takes while it is built.
    """

    build: Callable[[Task], Engine]
    needs: tuple[str, ...] = ()
    bf16: bool = False
    takes: float = 3.0


PEERS: Mapping[str, Peer] = {
    BASELINE: Peer(functools.partial(in_torch.eager, dtype=torch.float32), takes=0.0),
    "torch eager bf16": Peer(functools.partial(in_torch.eager, dtype=torch.bfloat16), takes=1.5),
    "torch autocast bf16": Peer(in_torch.autocast, takes=1.0),
    "torch.compile fp32": Peer(functools.partial(in_torch.compiled, dtype=torch.float32)),
    "torch.compile bf16": Peer(functools.partial(in_torch.compiled, dtype=torch.bfloat16)),
    "torchao int8": Peer(in_torch.torchao_int8, ("torchao",)),
    "openvino fp32": Peer(functools.partial(in_engines.openvino_float, precision="f32")),
    "openvino bf16": Peer(functools.partial(in_engines.openvino_float, precision="bf16"), bf16=True),
    **{
        f"nncf int8 {hint}, {precision}": Peer(
            functools.partial(in_engines.nncf_int8, precision=precision, hint=hint),
            ("nncf",),
            bf16=precision == "bf16",
        )
        for hint in ("performance", "mixed", "transformer")
        for precision in ("f32", "bf16")
    },
    "onnxruntime fp32": Peer(in_engines.onnxruntime_float, ("onnx", "onnxruntime")),
    "onnxruntime int8": Peer(in_engines.onnxruntime_int8, ("onnx", "onnxruntime")),
}
"""In the order in which they take turns; the baseline first."""


def chosen(text: str | None) -> tuple[str, ...]:
    """The peers that a command line names: "all", or a list of beginnings of names; the baseline always.

    None: torch eager fp32 and bf16. Raises `OctavoError` for a name that begins no peer's.

    >>> chosen("openvino,onnxruntime int8")
    ('torch eager fp32', 'openvino fp32', 'openvino bf16', 'onnxruntime int8')
    """
    if text is None:
        return DEFAULT
    if text == "all":
        return tuple(PEERS)
    wanted = [part.strip() for part in text.split(",")]
    for part in wanted:
        if not part or not any(name.startswith(part) for name in PEERS):
            raise OctavoError(f"--peers: {part!r} is not all, or the beginning of one of {', '.join(PEERS)}")
    return tuple(name for name in PEERS if name == BASELINE or name.startswith(tuple(wanted)))


@dataclass(frozen=True)
class Built:
    """The engines in order; the others by name, each with why, in one line: not to be had here, or failed.

    missing: a package that is not installed, a CPU without bf16, on which OpenVINO computes in f32 without a word, or
    too little memory, which would end the process without a word: those that are built stay there to take turns.
    """

    engines: dict[str, Engine]
    missing: dict[str, str]
    failed: dict[str, str]


def build(names: Iterable[str], task: Task, on_peer: Callable[[str], None] = lambda name: None) -> Built:
    """Build each peer and run it once. `on_peer` is told each name before. The baseline's own errors are raised."""
    built = Built({}, {}, {})
    weights = 4 * sum(parameter.numel() for parameter in task.denoiser.parameters())
    for name in names:
        if PEERS[name].bf16 and not has_bf16(openvino_core()):
            built.missing[name] = "this CPU has no bf16; OpenVINO would compute in f32"
            continue
        absent = [package for package in PEERS[name].needs if importlib.util.find_spec(package) is None]
        if absent:
            built.missing[name] = f"pip install {' '.join(absent)}"
            continue
        there, needed = available(), PEERS[name].takes * weights
        if there is not None and there < needed:
            built.missing[name] = (
                f"may take {needed / 2**30:.1f} GiB, and {there / 2**30:.1f} GiB are available; name fewer peers"
            )
            continue
        on_peer(name)
        try:
            engine = PEERS[name].build(task)
            engine()
        except Exception as error:  # whatever another tool raises is news about that tool
            if name == BASELINE:
                raise
            lines = str(error).strip().splitlines() or [""]
            built.failed[name] = f"{type(error).__name__}: {lines[0][:200]}"
        else:
            built.engines[name] = engine
    return built

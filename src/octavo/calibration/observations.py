"""Observe a full-precision network on calibration pairs: what each layer's input, and the output, look like."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from octavo.calibration.collect import PairStore
from octavo.diffusion import collate
from octavo.errors import OctavoError
from octavo.files import atomic_path
from octavo.quantization import HistogramObserver, walk

SAMPLED_IMAGE, NETWORK_OUTPUT, LEARNED_VARIANCE = "sampled_image", "network_output", "learned_variance"
STATE_FILE = "observers.safetensors"


@dataclass
class Observations:
    """Observers by layer name (inputs), and by operation for what the paper also quantizes.

    `executed` lists the layers in order of execution; `edges` the ones that read the image and write the output.
    """

    layers: dict[str, HistogramObserver] = field(default_factory=dict)
    operations: dict[str, HistogramObserver] = field(default_factory=dict)
    executed: list[str] = field(default_factory=list)
    edges: list[str] = field(default_factory=list)


def observe(
    denoiser: nn.Module, pairs: PairStore, *, state_folder: Path | None = None, progress: bool = True
) -> Observations:
    """Evaluate `denoiser` on every pair and observe the input of each convolution and linear.

    Memory does not grow with the number of pairs: one batch is held at a time, and each observer is a histogram of
    fixed size. With `state_folder` the observers are written after each batch, and a run that was killed goes on
    from there, to the same bits. `denoiser` is left as it was.
    """
    seen, first = _load_state(state_folder) if state_folder else (Observations(), 0)
    batches = tqdm(
        range(first, len(pairs)),
        desc="observe",
        unit="batch",
        initial=first,
        total=len(pairs),
        disable=not progress,
    )
    with torch.inference_mode(), _observed(denoiser, seen):
        for i in batches:
            denoiser(**collate(pairs.load(i)), return_dict=False)
            if state_folder:
                _save_state(state_folder, seen, i + 1)
    return seen


@contextmanager
def _observed(denoiser: nn.Module, seen: Observations) -> Iterator[None]:
    trace: list[tuple[str, bool]] = []
    hooks = [
        layer.register_forward_pre_hook(_observer_hook(name, seen, trace)) for name, layer in walk(denoiser)
    ]

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        trace.clear()
        sample = args[0] if args else next(iter(kwargs.values()))
        seen.operations.setdefault(SAMPLED_IMAGE, HistogramObserver()).observe(sample)

    def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        sample = args[0] if args else next(iter(kwargs.values()))
        for name, part in split_output(output[0], sample.shape[1]).items():
            seen.operations.setdefault(name, HistogramObserver()).observe(part)
        if not seen.executed:
            seen.executed = list(dict.fromkeys(name for name, _ in trace))
            seen.edges = edge_layers(trace)

    hooks.append(denoiser.register_forward_pre_hook(before, with_kwargs=True))
    hooks.append(denoiser.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _observer_hook(
    name: str, seen: Observations, trace: list[tuple[str, bool]]
) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        trace.append((name, args[0].ndim > 2))
        try:
            seen.layers.setdefault(name, HistogramObserver()).observe(args[0])
        except OctavoError as error:
            raise OctavoError(f"{name}: {error}") from error

    return hook


def edge_layers(trace: list[tuple[str, bool]]) -> list[str]:
    """The layers that read the image and write the output: first and last to run on more than [rows, features].

    `trace`: (layer name, has positions beside rows and features) in order of execution. Layers on [rows, features]
    embed the timestep and conditions.
    """
    spatial = [name for name, has_positions in trace if has_positions]
    return list(dict.fromkeys([spatial[0], spatial[-1]])) if spatial else []


def split_output(output: torch.Tensor, in_channels: int) -> dict[str, torch.Tensor]:
    """The network's output [rows, C, ...] as prediction and, where it has 2 x in_channels, learned variance."""
    if output.ndim > 2 and output.shape[1] == 2 * in_channels:
        prediction, variance = output.chunk(2, dim=1)
        return {NETWORK_OUTPUT: prediction, LEARNED_VARIANCE: variance}
    return {NETWORK_OUTPUT: output}


def _save_state(folder: Path, seen: Observations, batches: int) -> None:
    tensors = {
        f"{group}/{name}/{key}": value
        for group, observers in (("layers", seen.layers), ("operations", seen.operations))
        for name, observer in observers.items()
        for key, value in observer.state().items()
    }
    notes = {"batches": batches, "executed": seen.executed, "edges": seen.edges}
    with atomic_path(folder / STATE_FILE) as temporary:
        save_file(tensors, temporary, metadata={"observations": json.dumps(notes)})


def _load_state(folder: Path) -> tuple[Observations, int]:
    path = folder / STATE_FILE
    if not path.is_file():
        return Observations(), 0
    try:
        with safe_open(path, "pt") as file:
            notes = json.loads(file.metadata()["observations"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise OctavoError(f"{path}: not readable; delete it and start again") from error
    seen = Observations(executed=notes["executed"], edges=notes["edges"])
    states: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        group, name, leaf = key.split("/")
        states.setdefault((group, name), {})[leaf] = value
    for (group, name), state in states.items():
        observer = HistogramObserver()
        observer.load_state(state)
        (seen.layers if group == "layers" else seen.operations)[name] = observer
    return seen, int(notes["batches"])

"""Observe a full-precision network on calibration pairs: what each layer's input, and the output, look like."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
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
from octavo.calibration.evaluate import evaluate
from octavo.calibration.tracing import evaluating, split_output
from octavo.diffusion import first_output
from octavo.errors import OctavoError
from octavo.files import atomic_path
from octavo.processes import Processes
from octavo.quantization import HistogramObserver, attention_calls, walk
from octavo.quantization.balancing import multiplied_input

SAMPLED_IMAGE = "sampled_image"
STATE_FILE = "observers.safetensors"


@dataclass
class Observations:
    """Observers by layer name (inputs), and by operation for what the paper also quantizes.

    `attention`: by the owner's name and "query", "key" or "value", joined by a dot.
    """

    layers: dict[str, HistogramObserver] = field(default_factory=dict)
    operations: dict[str, HistogramObserver] = field(default_factory=dict)
    attention: dict[str, HistogramObserver] = field(default_factory=dict)

    def groups(self) -> dict[str, dict[str, HistogramObserver]]:
        return {"layers": self.layers, "operations": self.operations, "attention": self.attention}


def observe(
    denoiser: nn.Module,
    pairs: PairStore,
    *,
    multipliers: Mapping[str, torch.Tensor] | None = None,
    attention: Collection[str] | None = None,
    state_folder: Path | None = None,
    processes: Processes | None = None,
    progress: bool = True,
) -> Observations:
    """Evaluate `denoiser` on every pair and observe the input of each convolution and linear.

    Memory does not grow with the number of pairs: one batch is held at a time, evaluated on no more rows at once
    than images were denoised at once, and each observer is a histogram of fixed size. With `state_folder` the
    observers are written after each batch, and a run that was killed goes on from there, to the same bits.
    `denoiser` is left as it was.

    With `multipliers` (layer name -> `[input channels]`) only those layers are observed, behind their multiplication;
    with `attention` (names of modules that compute attention) only what these hand to it. `state_folder` must then be
    another one. Process r of `processes` looks at every W-th batch alone, and keeps its state apart from the others'
    (`merge_observations` adds them up).
    """
    together = processes or Processes()
    own = range(len(pairs))[together.rank :: together.count]
    state = state_folder / state_file(together) if state_folder else None
    seen, first = _load_state(state) if state else (Observations(), 0)
    batches = tqdm(
        own[first:], desc="observe", unit="batch", initial=first, total=len(own), disable=not progress
    )
    hooks = (
        _observed(denoiser, seen, multipliers)
        if attention is None
        else attention_calls(denoiser, _operands_observer(seen, attention))
    )
    with torch.inference_mode(), evaluating(denoiser), hooks:
        for done, i in enumerate(batches, first + 1):
            evaluate(denoiser, [pairs.load(i)])
            if state:
                _save_state(state, seen, done)
    return seen


def state_file(processes: Processes) -> str:
    """Where a process keeps what it has observed: a name of its own for each process and number of processes."""
    return (
        STATE_FILE if processes.count == 1 else f"observers-{processes.rank}-of-{processes.count}.safetensors"
    )


def merge_observations(folder: Path, count: int, batches: int) -> None:
    """Add up what `count` processes have observed, as if one had: the same bits, for `observe` to go on from.

    Observers count integers, so that order and share do not matter. batches: of all processes together. What the
    processes wrote is removed.
    """
    total = Observations()
    paths = [folder / state_file(Processes(rank, count)) for rank in range(count)]
    for path in paths:
        seen, _ = _load_state(path)
        for group, observers in seen.groups().items():
            for name, observer in observers.items():
                total.groups()[group].setdefault(name, HistogramObserver()).merge(observer)
    _save_state(folder / STATE_FILE, total, batches)
    for path in paths:
        path.unlink(missing_ok=True)


@contextmanager
def _observed(
    denoiser: nn.Module, seen: Observations, multipliers: Mapping[str, torch.Tensor] | None
) -> Iterator[None]:
    hooks: list[Any] = [
        layer.register_forward_pre_hook(_observer_hook(name, seen, (multipliers or {}).get(name)))
        for name, layer in walk(denoiser)
        if multipliers is None or name in multipliers
    ]

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else next(iter(kwargs.values()))
        _look(seen.operations, SAMPLED_IMAGE, sample)

    def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        sample = args[0] if args else next(iter(kwargs.values()))
        for name, part in split_output(first_output(output), sample.shape[1]).items():
            _look(seen.operations, name, part)

    if multipliers is None:
        hooks.append(denoiser.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(denoiser.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _look(observers: dict[str, HistogramObserver], name: str, x: torch.Tensor) -> None:
    """Let the observer called `name` count `x`; what it refuses is told by that name."""
    try:
        observers.setdefault(name, HistogramObserver()).observe(x)
    except OctavoError as error:
        raise OctavoError(f"{name}: {error}") from error


def _observer_hook(
    name: str, seen: Observations, multiplier: torch.Tensor | None
) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def hook(layer: Any, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0]
        if multiplier is not None:
            x = multiplied_input(x, multiplier.to(x.device), layer.weight.ndim)
        _look(seen.layers, name, x)

    return hook


def _operands_observer(seen: Observations, owners: Collection[str]) -> Callable[..., None]:
    def see(owner: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        if owner not in owners:
            return
        for operand, x in {"query": query, "key": key, "value": value}.items():
            _look(seen.attention, f"{owner}.{operand}", x)

    return see


def _save_state(path: Path, seen: Observations, batches: int) -> None:
    tensors = {
        f"{group}/{name}/{key}": value
        for group, observers in seen.groups().items()
        for name, observer in observers.items()
        for key, value in observer.state().items()
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"observations": json.dumps({"batches": batches})})


def _load_state(path: Path) -> tuple[Observations, int]:
    if not path.is_file():
        return Observations(), 0
    try:
        with safe_open(path, "pt") as file:
            notes = json.loads(file.metadata()["observations"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise OctavoError(f"{path}: not readable; delete it and start again") from error
    seen = Observations()
    states: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        group, name, leaf = key.split("/")
        states.setdefault((group, name), {})[leaf] = value
    for (group, name), state in states.items():
        observer = HistogramObserver()
        observer.load_state(state)
        seen.groups()[group][name] = observer
    return seen, int(notes["batches"])

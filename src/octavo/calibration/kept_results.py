"""Results of a network's finished parts, kept on the disk from pass to pass, so that they are not computed again."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from octavo.calibration.calls import Calls, Forward, is_dense, wrapped_forwards

KEPT_BYTES = 8 * 2**30
"""Kept at most; what is beyond is computed again in each pass."""
LEFT_FREE = 2**30
"""Room on the disk that is left to others."""


@contextmanager
def folder_beside(state: Path | None) -> Iterator[Path | None]:
    """A name for a folder beside a file of work in progress; what is there is removed before and behind the block."""
    if state is None:
        yield None
        return
    folder = state.with_name(f"{state.stem}-results")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class KeptResults:
    """What the calls of modules returned, for each evaluation by number, in files in `folder`, which is its alone.

    One pass after the other evaluates the network on the same inputs while its layers change from front to back. What
    comes before the first layer that will change is the same in all later passes: there the outermost calls that have
    ended are kept in one pass, and in the next their results are given back instead (`Call.repeatable`). Kept are only
    those that something reads which is computed again. So what a pass costs is its own part of the network.

    calls       of one evaluation; others of the same network are taken to be alike as far as they are seen to be: an
                evaluation that reaches a layer that is to change before its time is not kept.
    """

    def __init__(self, network: nn.Module, calls: Calls, folder: Path, limit: int | None = None) -> None:
        self.network = network
        self.calls = calls
        self.folder = folder
        self.changing: Collection[str] = ()
        self.finished: Collection[int] = ()
        self.numbers = {(call.module, call.nth): number for number, call in enumerate(calls)}
        self._left = KEPT_BYTES if limit is None else limit
        self._kept: dict[int, dict[int, _Kept]] = {}
        self._given_up: set[int] = set()

    def begin_pass(self, changing: Collection[str], *, is_last: bool = False) -> None:
        """From now on `changing` are the layers that this pass or a later one changes; of the last, nothing is kept."""
        firsts = [moment for name in changing if (moment := self.calls.first_of(name)) is not None]
        self.changing = changing
        self.finished = set() if is_last or not firsts else self.calls.ended_before(min(firsts))

    @contextmanager
    def evaluation(self, number: int) -> Iterator[None]:
        """Within the block the network is evaluated once, as evaluation `number` of the pass.

        It may be left early, but not before all that is finished has been computed: then nothing is kept of it.
        """
        if number in self._given_up:
            yield
            return
        known = self._kept.setdefault(number, {})
        run = _Run(self, number, known)

        def around(name: str, module: nn.Module, forward: Forward) -> Forward | None:
            if name in self.changing:
                return run.marked(forward)
            return run.wrapped(name, forward) if name in run.modules else None

        try:
            with wrapped_forwards(self.network, around):
                yield
        finally:
            if all(call in known for call in self.finished):
                self._drop_what_is_over(known)
            else:
                self.give_up(number)

    def _drop_what_is_over(self, known: dict[int, _Kept]) -> None:
        """What is within larger results now, or read by nothing any more."""
        for call in list(known):
            if call not in self.finished:
                self._drop(known.pop(call))
            elif not self.calls.is_read(call, self.finished):
                self._drop(known[call])

    def give_up(self, number: int) -> None:
        """From now on that evaluation is computed in full."""
        self._given_up.add(number)
        for kept in self._kept.pop(number, {}).values():
            self._drop(kept)

    def keep(self, number: int, call: int, result: Any) -> None:
        """Keep what a call of that evaluation returned, if there is room."""
        leaves = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, torch.Tensor)]
        if not all(map(is_dense, leaves)):
            return
        kept = _Kept(result)
        if kept.tensors and self.calls.is_read(call, self.finished):
            size = sum(tensor.nbytes for tensor in kept.tensors.values())
            path = self.folder / f"{number}-{call}.safetensors"
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                if size > self._left or shutil.disk_usage(self.folder).free < size + LEFT_FREE:
                    return
                save_file(kept.tensors, path)
            except (OSError, SafetensorError):
                path.unlink(missing_ok=True)
                return
            kept.path, kept.size = path, size
            self._left -= size
        kept.tensors = {}
        self._kept[number][call] = kept

    def _drop(self, kept: _Kept) -> None:
        if kept.path is not None:
            with suppress(OSError):
                kept.path.unlink(missing_ok=True)
            self._left += kept.size
            kept.path, kept.size = None, 0


class _Kept:
    """One result: its tensors in a file, and how they lie in it. Without a file they are NaN of the same shapes."""

    def __init__(self, result: Any) -> None:
        leaves, self._tree = _flat(result)
        self.path: Path | None = None
        self.size = 0
        self.tensors: dict[str, torch.Tensor] = {}
        self._leaves: list[Any] = []
        places: dict[int, str] = {}
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor):
                self._leaves.append(leaf)
                continue
            name = places.setdefault(id(leaf), str(len(places)))
            # as it lies in memory: what is computed of it does the same sums in the same order. As bytes:
            # safetensors has no name for complex128
            self.tensors[name] = leaf.as_strided((leaf.numel(),), (1,)).to("cpu", copy=True).view(torch.uint8)
            self._leaves.append(_Place(name, leaf))

    def value(self) -> Any:
        tensors = load_file(self.path) if self.path is not None else {}
        made: dict[str, torch.Tensor] = {}
        leaves = []
        for leaf in self._leaves:
            if isinstance(leaf, _Place):
                leaf = made.setdefault(leaf.name, leaf.tensor(tensors.get(leaf.name)))
            leaves.append(leaf)
        return tree_unflatten(leaves, self._tree)


def _flat(result: Any) -> tuple[list[Any], TreeSpec]:
    return tree_flatten(result)


class _Place:
    """Where a tensor is in a result: what it looks like, without what it holds."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name, self._size, self._stride = name, tensor.shape, tensor.stride()
        self._like: dict[str, Any] = {"dtype": tensor.dtype, "device": tensor.device}

    def tensor(self, values: torch.Tensor | None) -> torch.Tensor:
        if values is None:
            number = torch.zeros((), **self._like)
            if number.is_floating_point() or number.is_complex():
                number = number + float("nan")
            return number.expand(self._size)
        values = values.to(self._like["device"], copy=True).view(self._like["dtype"])
        return values.as_strided(self._size, self._stride)


class _Run:
    """One evaluation: counts the calls, gives back what is kept, keeps what is finished."""

    def __init__(self, kept: KeptResults, number: int, known: dict[int, _Kept]) -> None:
        self.kept, self.number, self.known = kept, number, dict(known)
        self.modules = {kept.calls[call].module for call in {*kept.finished, *known}}
        self._times: Counter[str] = Counter()
        self._is_before = True

    def marked(self, forward: Forward) -> Forward:
        """A layer that is to change: behind it nothing is kept."""

        def reached(*args: Any, **kwargs: Any) -> Any:
            self._is_before = False
            return forward(*args, **kwargs)

        return reached

    def wrapped(self, name: str, forward: Forward) -> Forward:
        def called(*args: Any, **kwargs: Any) -> Any:
            call = self.kept.numbers.get((name, self._times[name]))
            self._times[name] += 1
            if call is not None and call in self.known:
                self._times.update(self.kept.calls.inside(call))
                return self.known[call].value()
            result = forward(*args, **kwargs)
            if call is not None and call in self.kept.finished and self._is_before:
                self.kept.keep(self.number, call, result)
            return result

        return called

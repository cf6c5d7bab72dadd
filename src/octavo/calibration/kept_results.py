"""Results of a network's finished parts, kept on the disk from pass to pass, so that they are not computed again."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from octavo.calibration.calls import ROOT, Calls, Forward, is_dense, wrapped_forwards
from octavo.errors import OctavoError

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
    those that something reads which is computed again. So every part of the network is computed twice, in the pass that
    changes it and in the next: as far as there is room for results, and but for what is not repeatable.

    calls       of one evaluation. Of another nothing is kept once it is seen to differ: where it reaches a layer that
                is to change before its time, or its finished calls are other ones, or within other ones.
    limit       bytes of all results at a time; None: `KEPT_BYTES`.
    left_free   bytes on the disk that others may need.
    """

    def __init__(
        self,
        network: nn.Module,
        calls: Calls,
        folder: Path,
        limit: int | None = None,
        left_free: int = LEFT_FREE,
    ) -> None:
        self.network = network
        self.calls = calls
        self.folder = folder
        self.changing: frozenset[str] = frozenset()
        self.finished: frozenset[int] = frozenset()
        self._left = KEPT_BYTES if limit is None else limit
        self._left_free = left_free
        self._kept: dict[int, dict[int, _Kept]] = {}
        self._given_up: set[int] = set()

    def begin_pass(self, changing: Collection[str], *, is_last: bool = False) -> None:
        """From now on `changing` are the layers that this pass or a later one changes; of the last, nothing is kept."""
        firsts = [moment for name in changing if (moment := self.calls.first_of(name)) is not None]
        self.changing = frozenset(changing)
        self.finished = frozenset(() if is_last or not firsts else self.calls.ended_before(min(firsts)))

    @contextmanager
    def evaluation(self, number: int) -> Iterator[None]:
        """Within the block the network is evaluated once, as evaluation `number` of the pass.

        It may be left early, but not before all that is finished has been computed: then nothing is kept of it.
        """
        if not all(kept.is_there() for kept in self._kept.get(number, {}).values()):  # who cleans folders up?
            self._give_up(number)
        if number in self._given_up:
            yield
            return
        run = _Run(self, number, self._kept.setdefault(number, {}))

        def around(name: str, module: nn.Module, forward: Forward) -> Forward | None:
            if name in self.changing:
                return run.marked(forward)
            return run.wrapped(name, forward) if name in run.modules else None

        try:
            with wrapped_forwards(self.network, around):
                yield
        finally:
            self._end(number, run)

    def _end(self, number: int, run: _Run) -> None:
        """Take what is new in place of what lies within it or is read no more; if it is not whole, leave what was."""
        known = self._kept[number]
        if run.is_alike and all(call in known or call in run.new for call in self.finished):
            known.update(run.new)
            for call in list(known):
                if call not in self.finished:
                    self._drop(known.pop(call))
                elif not known[call].has_numbers and not self.calls.is_read(call, self.finished):
                    self._drop(known[call])
            return
        for kept in run.new.values():
            self._drop(kept)
        if run.has_room or not run.is_alike:
            self._give_up(number)

    def _give_up(self, number: int) -> None:
        """From now on that evaluation is computed in full."""
        self._given_up.add(number)
        for kept in self._kept.pop(number, {}).values():
            self._drop(kept)

    def keep(self, number: int, call: int, result: Any) -> _Kept | None:
        """What a call of that evaluation returned, in a file if anything will read it; None: there is no room."""
        kept = _Kept(result)
        if not kept.has_numbers and not self.calls.is_read(call, self.finished):
            return kept
        path = self.folder / f"{number}-{call}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free - self._left_free
            if not kept.is_dense or kept.size > min(self._left, free):
                return None
            save_file(kept.bytes_of(result), path)
        except (OSError, SafetensorError):
            with suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        kept.path = path
        self._left -= kept.size
        return kept

    def _drop(self, kept: _Kept) -> None:
        if kept.path is not None:
            with suppress(OSError):
                kept.path.unlink(missing_ok=True)
            self._left += kept.size
            kept.path = None


class _Kept:
    """What a result looks like, and the file that its tensors are in. Without one its tensors are NaN.

    `size`: bytes of its tensors. `has_numbers`: some of them are not floating point, for which there is no NaN.
    """

    _tree: TreeSpec

    def __init__(self, result: Any) -> None:
        leaves, self._tree = tree_flatten(result)
        tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}
        self.path: Path | None = None
        self.size = sum(tensor.nbytes for tensor in tensors.values())
        self.has_numbers = not all(tensor.is_floating_point() for tensor in tensors.values())
        self.is_dense = all(map(is_dense, tensors.values()))
        names = {key: str(i) for i, key in enumerate(tensors)}
        self._leaves = [
            _Place(names[id(leaf)], leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves
        ]

    def is_there(self) -> bool:
        return self.path is None or self.path.is_file()

    def bytes_of(self, result: Any) -> dict[str, torch.Tensor]:
        """Its tensors as they lie in memory, so that what is computed of them does the same sums in the same order.

        As bytes: safetensors has no name for complex128.
        """
        return {
            place.name: leaf.as_strided((leaf.numel(),), (1,)).to("cpu", copy=True).view(torch.uint8)
            for place, leaf in zip(self._leaves, tree_flatten(result)[0], strict=True)
            if isinstance(place, _Place)
        }

    def value(self) -> Any:
        """The result, its tensors new ones. Raises `OctavoError` if the file is damaged."""
        made: dict[str, torch.Tensor] = {}
        for place in self._leaves:
            if isinstance(place, _Place) and place.name not in made:
                made[place.name] = place.nothing() if self.path is None else place.read(self.path)
        return tree_unflatten(
            [made[leaf.name] if isinstance(leaf, _Place) else leaf for leaf in self._leaves], self._tree
        )


class _Place:
    """Where a tensor is in a result: what it looks like, without what it holds."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name, self._size, self._stride = name, tensor.shape, tensor.stride()
        self._dtype, self._device = tensor.dtype, tensor.device

    def nothing(self) -> torch.Tensor:
        return torch.full((), float("nan"), dtype=self._dtype, device=self._device).expand(self._size)

    def read(self, path: Path) -> torch.Tensor:
        try:
            with safe_open(path, "pt") as file:
                values = file.get_tensor(self.name)
        except (OSError, SafetensorError) as error:
            raise OctavoError(f"{path}: not readable any more; start again") from error
        values = values.to(self._device, copy=True).view(self._dtype)
        return values.as_strided(self._size, self._stride)


class _Run:
    """One evaluation: counts the calls, gives back what is `known`, keeps what is finished, in `new`.

    `has_room`: there was for all of it. `is_alike`: the calls it saw are those of the evaluation that was watched.
    """

    def __init__(self, kept: KeptResults, number: int, known: dict[int, _Kept]) -> None:
        self.kept, self.number, self.known = kept, number, known
        self.new: dict[int, _Kept] = {}
        self.modules = {kept.calls[call].module for call in {*kept.finished, *known}}
        self.has_room = self.is_alike = True
        self._times: Counter[str] = Counter()
        self._open: list[int] = []
        self._is_before = True

    def marked(self, forward: Forward) -> Forward:
        """A layer that is to change: behind it nothing is kept."""

        def reached(*args: Any, **kwargs: Any) -> Any:
            self._is_before = False
            return forward(*args, **kwargs)

        return reached

    def wrapped(self, name: str, forward: Forward) -> Forward:
        def called(*args: Any, **kwargs: Any) -> Any:
            call = self._number(name)
            if call in self.known:
                self._times.update(self.kept.calls.inside(call))
                return self.known[call].value()
            self._open.append(call)
            try:
                result = forward(*args, **kwargs)
            finally:
                self._open.pop()
            if call in self.kept.finished and self._is_before and self.has_room and self.is_alike:
                kept = self.kept.keep(self.number, call, result)
                if kept is None:
                    self.has_room = False
                else:
                    self.new[call] = kept
            return result

        return called

    def _number(self, name: str) -> int:
        """Of the call that begins now; `ROOT` if the evaluation that was watched had none such."""
        call = self.kept.calls.number_of(name, self._times[name])
        self._times[name] += 1
        around = self._open[-1] if self._open else ROOT
        if self._is_before and (call == ROOT or self._within(call) != around):
            self.is_alike = False
        return call

    def _within(self, call: int) -> int:
        """The call around it, of those that are counted here."""
        around = (holder for holder in self.kept.calls.holders(call) if holder != call)
        return next((holder for holder in around if self.kept.calls[holder].module in self.modules), ROOT)

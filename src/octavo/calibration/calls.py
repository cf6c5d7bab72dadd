"""The calls of a network's modules in one evaluation: their order, who reads their results, which can be left out."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from octavo.calibration.labels import Labels, tensors_in

ROOT = -1
"""In place of a call's number: the network's own, which holds all others."""
Forward = Callable[..., Any]


@dataclass
class Call:
    """One call of a module.

    module, nth     its dotted name, and how often it had been called before in this evaluation.
    first, last     when it began and ended, in operations of torch.
    within          number of the call that it is part of, or `ROOT`.
    repeatable      its result can be given back without the call, as far as is seen: it returns tensors of its own,
                    numbers and strings; it draws nothing from torch's own generator, writes to no tensor that was there
                    before, sets no attribute of its module and puts nothing into its arguments; no tensor made in it is
                    read behind it but those that it returns. Not seen: what it changes within Python's other objects.
    readers         numbers of the innermost calls in which its result is read.
    """

    module: str
    nth: int
    first: int
    within: int
    last: int = -1
    repeatable: bool = True
    readers: set[int] = field(default_factory=set)


class Calls(Sequence[Call]):
    """Every call of a module in one evaluation, in the order in which they began; call i is number i.

    >>> network = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.SiLU()), nn.Linear(2, 2))
    >>> calls = watched_calls(network, lambda: network(torch.zeros(1, 2)))
    >>> [call.module for call in calls], calls[3].within == ROOT, calls[0].readers == {3}
    (['0', '0.0', '0.1', '1'], True, True)
    >>> calls.ended_before(calls.first_of("1")), calls.ended_before(calls.first_of("0.1"))
    ({0}, {1})
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = list(calls)
        self._firsts: dict[str, int] = {}
        self._inside: list[Counter[str]] = [Counter() for _ in self._calls]
        self._numbers = {(call.module, call.nth): number for number, call in enumerate(self._calls)}
        for number, call in enumerate(self._calls):
            self._firsts.setdefault(call.module, call.first)
            for holder in self.holders(number):
                if holder != number:
                    self._inside[holder][call.module] += 1

    def __len__(self) -> int:
        return len(self._calls)

    def __getitem__(self, number: Any) -> Any:
        return self._calls[number]

    def holders(self, number: int) -> Iterator[int]:
        """The call itself, the one that it is part of, and so on outwards."""
        while number != ROOT:
            yield number
            number = self._calls[number].within

    def number_of(self, module: str, nth: int) -> int:
        """The number of a call; `ROOT` if there was none such."""
        return self._numbers.get((module, nth), ROOT)

    def inside(self, number: int) -> Counter[str]:
        """How often each module is called within this call."""
        return self._inside[number]

    def first_of(self, module: str) -> int | None:
        """When that module is called first; None: never."""
        return self._firsts.get(module)

    def as_they_run(self, modules: Iterable[str]) -> list[str]:
        """Names of modules in the order of their first calls; what never ran comes last."""
        never = max((call.last for call in self._calls), default=0) + 1
        return sorted(modules, key=lambda name: self._firsts.get(name, never))

    def ended_before(self, moment: int) -> set[int]:
        """The repeatable calls that ended before that moment, of calls within each other the outermost."""
        ended = {i for i, call in enumerate(self._calls) if call.repeatable and call.last < moment}
        return {i for i in ended if not any(holder in ended for holder in self.holders(i) if holder != i)}

    def is_read(self, number: int, left_out: Collection[int]) -> bool:
        """Whether anything reads that call's result where the calls `left_out` are left out."""
        return any(
            not any(holder in left_out for holder in self.holders(reader))
            for reader in self._calls[number].readers
        )


def watched_calls(network: nn.Module, evaluate: Callable[[], Any]) -> Calls:
    """Watch what `evaluate()` does to `network`, which it evaluates once. Nothing is changed."""
    watch = _Watch()

    def around(name: str, module: nn.Module, forward: Forward) -> Forward:
        def watched(*args: Any, **kwargs: Any) -> Any:
            return watch.call(name, module, forward, args, kwargs)

        return watched

    with wrapped_forwards(network, around), watch:
        evaluate()
    return Calls(watch.calls)


@contextmanager
def wrapped_forwards(
    network: nn.Module, around: Callable[[str, nn.Module, Forward], Forward | None]
) -> Iterator[None]:
    """Within the block the forward of each module but the network itself is what `around` makes of it (None: as is)."""
    before: list[tuple[nn.Module, Forward | None]] = []
    try:
        for name, module in network.named_modules():
            own = vars(module).get("forward")
            new = around(name, module, module.forward) if name else None
            if new is not None:
                before.append((module, own))
                module.forward = functools.wraps(module.forward)(new)
        yield
    finally:
        for module, own in before:
            del module.forward
            if own is not None:
                module.forward = own


class _Watch(TorchDispatchMode):
    """Follows tensors by the memory they live in: which call made it, which calls returned it, who reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._now = 0
        self._open: list[int] = []
        self._times: Counter[str] = Counter()
        self._made: Labels[tuple[int, int]] = Labels()
        self._returned: Labels[frozenset[int]] = Labels()

    def call(self, name: str, module: nn.Module, forward: Forward, args: Any, kwargs: Any) -> Any:
        number, before = len(self.calls), (_leaves((args, kwargs)), _state(module))
        random = _random()
        self._now += 1
        call = Call(name, self._times[name], self._now, self._open[-1] if self._open else ROOT)
        self._times[name] += 1
        self.calls.append(call)
        self._open.append(number)
        result = forward(*args, **kwargs)
        self._open.pop()
        self._now += 1
        call.last = self._now
        if not _same(before[1], _state(module)):
            for holder in self._open:
                self.calls[holder].repeatable = False
            call.repeatable = False
        if (
            not _same(before[0], _leaves((args, kwargs)))
            or random != _random()
            or not self._is_own(result, call)
        ):
            call.repeatable = False
        for tensor in tensors_in(_leaves(result)):
            self._returned.put(tensor, (self._returned.of(tensor) or frozenset()) | {number})
        return result

    def _is_own(self, result: Any, call: Call) -> bool:
        """Whether a result can be written down: numbers, and dense tensors, each in memory made in the call."""
        taken: dict[int, list[range]] = {}
        tensors = {}
        for leaf in _leaves(result):
            if isinstance(leaf, torch.Tensor):
                tensors[id(leaf)] = leaf
            elif not isinstance(leaf, (int, float, str, type(None))):
                return False
        for tensor in tensors.values():
            made = self._made.of(tensor)
            if made is None or made[0] < call.first or not is_dense(tensor):
                return False
            own = range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
            others = taken.setdefault(tensor.untyped_storage()._cdata, [])
            if any(own.start < other.stop and other.start < own.stop for other in others):
                return False
            others.append(own)
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._now += 1
        read = list(tensors_in((args, kwargs)))
        for tensor in read:
            self._reads(tensor)
        if func._schema.is_mutable:
            for tensor in _written(func, args, kwargs):
                self._writes(tensor)
        known = {tensor.untyped_storage()._cdata for tensor in read}
        result = func(*args, **kwargs)
        for tensor in tensors_in(result):
            if tensor.untyped_storage()._cdata not in known:
                self._made.put(tensor, (self._now, self._open[-1] if self._open else ROOT))
        return result

    def _reads(self, tensor: torch.Tensor) -> None:
        returned = self._returned.of(tensor) or frozenset()
        for number in returned:
            self.calls[number].readers.add(self._open[-1] if self._open else ROOT)
        number = (self._made.of(tensor) or (0, ROOT))[1]
        while number != ROOT and number not in self._open:
            if number not in returned:
                self.calls[number].repeatable = False
            number = self.calls[number].within

    def _writes(self, tensor: torch.Tensor) -> None:
        made = (self._made.of(tensor) or (0, ROOT))[0]
        for number in self._open:
            if self.calls[number].first > made:
                self.calls[number].repeatable = False


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether its values fill its memory without a gap, in whatever order of the dimensions.

    >>> is_dense(torch.zeros(2, 3).T), is_dense(torch.zeros(2, 3)[:, :2]), is_dense(torch.zeros(1).expand(3))
    (True, False, False)
    """
    if tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
        return False
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != reach:
                return False
            reach *= size
    return tensor.numel() > 0


def _random() -> bytes:
    """Where torch's own generator stands, which a layer that draws nothing leaves alone."""
    return torch.get_rng_state().numpy().tobytes()


def _leaves(value: Any) -> list[Any]:
    return tree_flatten(value)[0]


def _state(module: nn.Module) -> list[Any]:
    return [*vars(module), *vars(module).values(), *module._buffers.values(), *module._parameters.values()]


def _same(before: list[Any], now: list[Any]) -> bool:
    return len(before) == len(now) and all(a is b for a, b in zip(before, now, strict=True))


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    """The tensors that an operation writes to, by its schema."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tensors_in(args[i] if i < len(args) else kwargs.get(argument.name))

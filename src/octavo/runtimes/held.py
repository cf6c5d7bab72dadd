"""Tensors of a call whose values a network reads as numbers of Python: a graph of it is for these values alone.

A mask's lengths that become slices (`mask.sum(1).tolist()` in Lumina 2), or sizes that come as tensors, go into a trace
as constants. The graph would compute with them whatever the next call's are, and nobody would see it. Such a tensor is
held: it is a constant of the graph, part of its name, and another value has a graph of its own, for one number of rows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from octavo.calibration.labels import Labels, tensors_in
from octavo.errors import OctavoError
from octavo.runtimes.calls import Call, Held, Slot

NUMBERS = {"tolist", "item", "numpy", "__bool__", "__int__", "__index__", "__float__", "__array__"}
"""Functions of torch that give a tensor's values to Python."""
OF_SHAPES = {
    "size",
    "dim",
    "numel",
    "__len__",
    "zeros_like",
    "ones_like",
    "empty_like",
    "new_zeros",
    "new_ones",
}
"""Functions whose results depend on a tensor's shape and dtype alone, beside what is read of an attribute."""


class ReadsValues(OctavoError):
    """The network reads the values of `names`, tensors of its call, which have to be held."""

    def __init__(self, message: str, names: Collection[str]) -> None:
        super().__init__(message)
        self.names = frozenset(names)


def with_held(call: Call, names: Collection[str]) -> Call:
    """The call with its tensors of these names as constants.

    >>> template = {"sample": Slot(0, "sample"), "mask": Slot(1, "mask")}
    >>> held = with_held(Call(template, (torch.zeros(1), torch.ones(1)), ("sample", "mask"), 1), ["mask"])
    >>> held.names, held.kwargs(held.tensors)["mask"]
    (('sample',), tensor([1.]))
    """
    kept = [i for i, name in enumerate(call.names) if name not in names]

    def placed(value: Any) -> Any:
        if isinstance(value, Slot):
            if value.path in names:
                return Held(value.path, call.tensors[value.index])
            return Slot(kept.index(value.index), value.path)
        if isinstance(value, dict):
            return {key: placed(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(placed(item) for item in value)
        return value

    return replace(
        call,
        template=placed(call.template),
        tensors=tuple(call.tensors[i] for i in kept),
        names=tuple(call.names[i] for i in kept),
    )


class RefusingToRead(TorchFunctionMode):
    """Within the block, `ReadsValues` is raised where a number of Python is made of one of the tensors.

    Of those alone that hold no floats: masks, lengths, positions, labels. What is computed from one is followed.

    >>> mask = torch.tensor([True, False])
    >>> with RefusingToRead("Network", ["mask"], [mask]):
    ...     length = mask.sum()
    ...     int(length)
    Traceback (most recent call last):
    ...
    octavo.runtimes.held.ReadsValues: Network: its graph is for the values of mask that it was converted with; ...
    """

    def __init__(self, network: str, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.network = network
        self._sources: Labels[frozenset[str]] = Labels()
        for name, tensor in zip(names, tensors, strict=True):
            if not tensor.is_floating_point():
                self._sources.put(tensor, frozenset({name}))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__" or name in OF_SHAPES:
            return func(*args, **kwargs)
        read: frozenset[str] = frozenset().union(*map(self._of, tensors_in((args, kwargs))))
        if read and name in NUMBERS:
            raise ReadsValues(
                f"{self.network}: its graph is for the values of {', '.join(sorted(read))} that it was converted with; "
                "sample it by octavo.accelerate (--runtime openvino), which makes a graph for each, or in torch",
                read,
            )
        result = func(*args, **kwargs)
        if read:
            written = list(tensors_in(result))
            if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
                written += list(tensors_in(args[:1]))
            for tensor in written:
                self._sources.put(tensor, self._of(tensor) | read)
        return result

    def _of(self, tensor: torch.Tensor) -> frozenset[str]:
        return self._sources.of(tensor) or frozenset()

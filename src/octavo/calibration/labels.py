"""Labels on the memory that tensors live in: views carry them, copies and results do not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef

Label = TypeVar("Label")


LOOKS = 256
"""So many labels are put between two looks for what was freed."""


class Labels(Generic[Label]):
    """One label for each storage. Memory that is freed is forgotten: its address may come again.

    A label holds no memory but what describes the storage. Where it stays, though, the C library cannot join what is
    freed on its two sides: the heap of a large network grew by gigabytes of holes. So freed ones are looked for.

    >>> labels = Labels[str]()
    >>> x = torch.zeros(2, 3)
    >>> labels.put(x, "image")
    >>> labels.of(x.transpose(0, 1)), labels.of(x + 1)
    ('image', None)
    """

    def __init__(self) -> None:
        self._of_storage: dict[int, tuple[StorageWeakRef, Label]] = {}
        self._put = 0

    def put(self, tensor: torch.Tensor, label: Label) -> None:
        reference = StorageWeakRef(tensor.untyped_storage())
        self._of_storage[reference.cdata] = (reference, label)
        self._put += 1
        if (
            self._put >= LOOKS + len(self._of_storage) // 2
        ):  # so that all looks together cost a constant a label
            self._put = 0
            self._of_storage = {key: one for key, one in self._of_storage.items() if not one[0].expired()}

    def of(self, tensor: torch.Tensor) -> Label | None:
        """The label of the memory that `tensor` is a view of; None where there is none."""
        # the reference keeps the address taken, so that no other storage can have it
        found = self._of_storage.get(tensor.untyped_storage()._cdata)
        return None if found is None else found[1]

    def remove(self, tensor: torch.Tensor) -> None:
        self._of_storage.pop(tensor.untyped_storage()._cdata, None)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested arguments: lists, tuples, dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)

"""Labels on the memory that tensors live in: views carry them, copies and results do not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef

Label = TypeVar("Label")


class Labels(Generic[Label]):
    """One label for each storage. Memory that is freed is forgotten: its address may come again.

    >>> labels = Labels[str]()
    >>> x = torch.zeros(2, 3)
    >>> labels.put(x, "image")
    >>> labels.of(x.transpose(0, 1)), labels.of(x + 1)
    ('image', None)
    """

    def __init__(self) -> None:
        self._of_storage: dict[int, tuple[StorageWeakRef, Label]] = {}

    def put(self, tensor: torch.Tensor, label: Label) -> None:
        reference = StorageWeakRef(tensor.untyped_storage())
        self._of_storage[reference.cdata] = (reference, label)

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

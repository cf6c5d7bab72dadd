"""What a network's layers depend on: the timestep alone, or the image and other conditions too.

Found by running the network once and following the data: the result of every operation depends on all that its operands
depend on. Names of layers play no part. What leaves the tensors as a Python number may come back anywhere, so all that
is computed afterwards depends on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.calibration.labels import Labels, tensors_in
from octavo.diffusion.pairs import TIMESTEP_NAMES

TIMESTEP, OTHER = "timestep", "other"
NOTHING: frozenset[str] = frozenset()


class Dependence(TorchDispatchMode):
    """Within the block, `of(tensor)` says what a tensor was computed from: {TIMESTEP, OTHER}, what was `add`ed.

    `inputs`: the tensors that the network is handed, with the name of their source. Parameters and constants have none.

    >>> timestep, image, weight = torch.ones(1), torch.ones(1, 4), torch.ones(4, 1)
    >>> with Dependence({TIMESTEP: timestep, OTHER: image}) as dependence:
    ...     embedding = weight @ timestep.cos()
    ...     changed = image + embedding
    >>> sorted(dependence.of(embedding)), sorted(dependence.of(changed)), sorted(dependence.of(weight))
    (['timestep'], ['other', 'timestep'], [])
    """

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        super().__init__()
        self._sources: Labels[frozenset[str]] = Labels()
        self._left: frozenset[str] = NOTHING
        for source, value in inputs.items():
            for tensor in tensors_in(value):
                self.add(tensor, source)

    def add(self, tensor: torch.Tensor, source: str) -> None:
        """From now on `tensor`, and what is computed from it, was computed from `source` too."""
        self._sources.put(tensor, self.of(tensor) | {source})

    def of(self, tensor: torch.Tensor) -> frozenset[str]:
        return self._sources.of(tensor) or NOTHING

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = self._left.union(*(self.of(tensor) for tensor in tensors_in((args, kwargs))))
        result = func(*args, **kwargs)
        if not any(True for _ in tensors_in(result)):
            self._left = read  # a number, or nothing
        written = list(tensors_in(result))
        if func._schema.is_mutable:
            written += tensors_in((args, kwargs))
        for tensor in written:
            if read - self.of(tensor):  # memory that is written to keeps what it held, elsewhere in it
                self._sources.put(tensor, read | self.of(tensor))
        return result


def with_tensor_timestep(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A denoiser call's keyword arguments with the timestep as a tensor, and its inputs by source for `Dependence`."""
    kwargs, inputs = dict(kwargs), {}
    others = []
    for name, value in kwargs.items():
        if name in TIMESTEP_NAMES and value is not None:
            kwargs[name] = inputs[TIMESTEP] = torch.as_tensor(value).clone()
        else:
            others.append(value)
    return kwargs, {**inputs, OTHER: others}

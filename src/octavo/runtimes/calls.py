"""A denoiser call taken apart: the tensors that an engine must be fed, and a template of all the rest.

Pipelines call denoisers in many ways: positionally or by keyword, with the timestep as an int, a scalar
tensor or one per row, with dictionaries of extra conditions. An engine wants a fixed list of tensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

TIMESTEP = "timestep"


@dataclass(frozen=True)
class Slot:
    """Stands in a template where tensor number `index` was; `path` names it (`added_cond_kwargs.time_ids`)."""

    index: int
    path: str


@dataclass(frozen=True)
class Call:
    """One denoiser call: `template` (keyword arguments with `Slot`s) and the tensors that fill it."""

    template: dict[str, Any]
    tensors: tuple[torch.Tensor, ...]
    names: tuple[str, ...]
    rows: int

    @property
    def constants(self) -> str:
        """Everything of the call that is not a tensor's value or shape, as text: the same text, the same graph."""
        return repr(self.template)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(tensor.shape) for tensor in self.tensors)

    def kwargs(self, tensors: Sequence[torch.Tensor]) -> dict[str, Any]:
        """The keyword arguments of the call with `tensors` in place of its own."""
        return {name: _fill(value, tensors) for name, value in self.template.items()}

    def batched(self, rows: int) -> tuple[torch.Tensor, ...]:
        """The tensors with their first `rows` rows, repeated where there are fewer (for tracing)."""
        return tuple(
            tensor[torch.arange(rows) % self.rows] if _has_rows(tensor, self.rows) else tensor
            for tensor in self.tensors
        )

    def row_dynamic_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes with -1 for the number of rows."""
        return tuple(
            (-1, *tensor.shape[1:]) if _has_rows(tensor, self.rows) else tuple(tensor.shape)
            for tensor in self.tensors
        )


def take_apart(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Take the call `forward(*args, **kwargs)` apart.

    The first argument is the noisy image (rows first). The timestep becomes float32 of shape [rows], which is
    what diffusers' own embedding makes of it. `return_dict` and arguments that are None or at their default
    are dropped. Floating tensors become float32.
    """
    bound = inspect.signature(forward).bind(*args, **kwargs)
    defaults = {name: p.default for name, p in inspect.signature(forward).parameters.items()}
    arguments = {
        name: value
        for name, value in bound.arguments.items()
        if name != "return_dict" and not _is_default(value, defaults[name])
    }
    rows = next(iter(arguments.values())).shape[0]
    if TIMESTEP in arguments:
        arguments[TIMESTEP] = (
            torch.as_tensor(arguments[TIMESTEP], dtype=torch.float32).expand(rows).contiguous()
        )
    tensors: list[torch.Tensor] = []
    names: list[str] = []
    template = {name: _empty(value, name, tensors, names) for name, value in arguments.items()}
    return Call(template, tuple(tensors), tuple(names), rows)


def _is_default(value: Any, default: Any) -> bool:
    return value is None or (not isinstance(value, torch.Tensor) and value is default)


def _has_rows(tensor: torch.Tensor, rows: int) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] == rows


def _empty(value: Any, path: str, tensors: list[torch.Tensor], names: list[str]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors.append(value.float() if value.is_floating_point() else value)
        names.append(path)
        return Slot(len(tensors) - 1, path)
    if isinstance(value, dict):
        return {key: _empty(item, f"{path}.{key}", tensors, names) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_empty(item, f"{path}.{i}", tensors, names) for i, item in enumerate(value))
    return value


def _fill(value: Any, tensors: Sequence[torch.Tensor]) -> Any:
    if isinstance(value, Slot):
        return tensors[value.index]
    if isinstance(value, dict):
        return {key: _fill(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_fill(item, tensors) for item in value)
    return value


def tensors_of(output: Any) -> Iterator[torch.Tensor]:
    """The tensors of a denoiser's output, whether it is a tensor, a tuple or an output dataclass."""
    if isinstance(output, torch.Tensor):
        yield output
    else:
        yield from (item for item in output if isinstance(item, torch.Tensor))

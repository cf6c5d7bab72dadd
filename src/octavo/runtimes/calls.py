"""A denoiser call taken apart: the tensors that an engine must be fed, and a template of all the rest.

Pipelines call denoisers in many ways: positionally or by keyword, with the timestep as an int, a scalar
tensor or one per row, with dictionaries of extra conditions. An engine wants a fixed list of tensors.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from octavo.diffusion.denoiser import signature_of, takes_return_dict
from octavo.diffusion.pairs import WITHOUT_ROWS

TIMESTEP = "timestep"


@dataclass(frozen=True)
class Slot:
    """Stands in a template where tensor number `index` was; `path` names it (`added_cond_kwargs.time_ids`)."""

    index: int
    path: str


@dataclass(frozen=True)
class Held:
    """Stands in a call's template for a tensor that is a constant of its graph."""

    path: str
    tensor: torch.Tensor

    def __repr__(self) -> str:
        """As text that is the same for the same values alone: graphs are named by it."""
        values = hashlib.sha256(self.tensor.contiguous().numpy().tobytes()).hexdigest()[:16]
        return f"Held({self.path!r}, {self.tensor.dtype}, {list(self.tensor.shape)}, {values})"


@dataclass(frozen=True)
class Call:
    """One denoiser call: `template` (keyword arguments with `Slot`s, and `Held` tensors) and the tensors that fill it.

    `dtype` is the noisy image's, `return_dict` what the caller asked for, None where the network knows of no such thing
    and returns one tensor; neither is part of the graph.
    """

    template: dict[str, Any]
    tensors: tuple[torch.Tensor, ...]
    names: tuple[str, ...]
    rows: int
    dtype: torch.dtype = torch.float32
    return_dict: bool | None = True

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
            tensor[torch.arange(rows) % self.rows] if has_rows else tensor
            for tensor, has_rows in self._with_rows()
        )

    def part(self, index: int, parts: int) -> tuple[torch.Tensor, ...]:
        """The tensors of part `index` of `parts` equal ones; what has no rows serves every part."""
        rows = self.rows // parts
        return tuple(
            tensor[index * rows : (index + 1) * rows] if has_rows else tensor
            for tensor, has_rows in self._with_rows()
        )

    def row_dynamic_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes with -1 for the number of rows."""
        return tuple(
            (-1, *tensor.shape[1:]) if has_rows else tuple(tensor.shape)
            for tensor, has_rows in self._with_rows()
        )

    def _with_rows(self) -> Iterator[tuple[torch.Tensor, bool]]:
        """Each tensor, and whether it holds one row for each of the batch."""
        for name, tensor in zip(self.names, self.tensors, strict=True):
            yield tensor, tensor.ndim > 0 and tensor.shape[0] == self.rows and name not in WITHOUT_ROWS


def take_apart(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, floats: bool = True
) -> Call:
    """Take the call `forward(*args, **kwargs)` apart.

    The first argument is the noisy image (rows first). The timestep becomes float32 of shape [rows], which is
    what diffusers' own embedding makes of it. Arguments at their default are dropped, those that a `**kwargs`
    of `forward` takes stand beside the others. Floating tensors become float32, unless `floats` is False: then all but
    the timestep keep their dtype. None has a gradient.
    """
    arguments = _by_name(forward, args, kwargs)
    return_dict = bool(arguments.pop("return_dict", True)) if takes_return_dict(forward) else None
    image = next(iter(arguments.values()))
    rows = image.shape[0]
    if TIMESTEP in arguments:
        arguments[TIMESTEP] = (
            torch.as_tensor(arguments[TIMESTEP], dtype=torch.float32).expand(rows).contiguous()
        )
    tensors: list[torch.Tensor] = []
    names: list[str] = []
    template = {name: _empty(value, name, tensors, names, floats) for name, value in arguments.items()}
    return Call(template, tuple(tensors), tuple(names), rows, image.dtype, return_dict)


def _by_name(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments by name, without those at their default."""
    signature = signature_of(forward)
    named: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif value is not signature.parameters[name].default:
            named[name] = value
    return named


def _empty(value: Any, path: str, tensors: list[torch.Tensor], names: list[str], floats: bool) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.detach()
        tensors.append(value.float() if floats and value.is_floating_point() else value)
        names.append(path)
        return Slot(len(tensors) - 1, path)
    if isinstance(value, dict):
        return {key: _empty(item, f"{path}.{key}", tensors, names, floats) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(
            _empty(item, f"{path}.{i}", tensors, names, floats) for i, item in enumerate(value)
        )
    return value


def _fill(value: Any, tensors: Sequence[torch.Tensor]) -> Any:
    if isinstance(value, Slot):
        return tensors[value.index]
    if isinstance(value, Held):
        return value.tensor
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

"""Complex numbers as pairs of real ones, while a network is traced: engines know few operations of complex tensors.

Rotary embeddings (RoFormer 2104.09864, eq. 13) turn pairs of channels by an angle, which some networks of diffusers
write as one product of complex numbers:

    (a + bi) (c + di) = (a c - b d) + (a d + b c) i

Within `ComplexAsPairs` no complex tensor of shape S is handed out: in its place is a `Pair`, which holds the real
tensor [*S, 2] that `torch.view_as_real` gives. Whatever moves numbers about (`repeat`, `gather`, `cat`, an index) moves
pairs about; a product is the one above. A complex tensor from before the block is a constant. What is not known here is
done to complex tensors, as it would be without, and its complex results are pairs again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Pair:
    """A complex tensor of shape S as `pairs`: float [*S, 2], real parts and imaginary parts."""

    def __init__(self, pairs: Tensor) -> None:
        self.pairs = pairs

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return applied(func, args, kwargs or {})

    @property
    def shape(self) -> Any:
        return self.pairs.shape[:-1]

    @property
    def ndim(self) -> int:
        return self.pairs.ndim - 1

    @property
    def dtype(self) -> torch.dtype:
        return torch.complex128 if self.pairs.dtype == torch.float64 else torch.complex64

    @property
    def device(self) -> torch.device:
        return self.pairs.device

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: Any) -> Pair:
        return Pair(self.pairs[_before_the_last(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.pairs[_before_the_last(index)] = paired(value).pairs

    def __mul__(self, other: Any) -> Any:
        return applied(torch.mul, (self, other), {})

    __rmul__ = __mul__

    def __getattr__(self, name: str) -> Any:
        method = getattr(Tensor, name)
        if not callable(method):
            raise AttributeError(f"a pair of real tensors has no {name!r}")
        return functools.partial(_applied_to, method, self)


class ComplexAsPairs(TorchFunctionMode):
    """Within the block, complex tensors are pairs of real ones.

    >>> with ComplexAsPairs():
    ...     turned = torch.view_as_complex(torch.ones(3, 2)) * torch.polar(torch.ones(1), torch.zeros(1))
    ...     type(turned).__name__, torch.view_as_real(turned.repeat(2)).shape
    ('Pair', torch.Size([6, 2]))
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return applied(func, args, kwargs or {})


def applied(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `func` gives, on pairs where it is known how, with pairs for its complex results."""
    name = getattr(func, "__name__", "")
    if name in MAKING:
        return MAKING[name](*args, **kwargs)
    if name in KNOWN and any(map(_is_complex, _flat((*args, *kwargs.values())))):
        return KNOWN[name](*args, **kwargs)
    if name in ("zeros", "ones", "empty") and getattr(kwargs.get("dtype"), "is_complex", False):
        return paired(func(*args, **kwargs))
    native = _each(args, _native), _each(kwargs, _native)
    result = func(*native[0], **native[1])
    return result if name == "__get__" else _each(result, _as_pair)


def paired(value: Any) -> Pair:
    """A `Pair` of what is one, of a complex constant, or of real numbers."""
    if isinstance(value, Pair):
        return value
    if not isinstance(value, Tensor):
        value = torch.tensor(value)
    if value.is_complex():  # by way of NumPy, which leaves no trace
        array = value.detach().resolve_conj().cpu().numpy()
        return Pair(torch.from_numpy(np.stack([array.real, array.imag], -1)))
    return Pair(torch.stack([value, torch.zeros_like(value)], -1))


def _applied_to(method: Any, pair: Pair, *args: Any, **kwargs: Any) -> Any:
    return applied(method, (pair, *args), kwargs)


def _before_the_last(index: Any) -> Any:
    """An index of a complex tensor as one of its pairs, whose last axis it leaves whole."""
    index = index if isinstance(index, tuple) else (index,)
    return (*index, slice(None)) if any(item is Ellipsis for item in index) else index


def _axis(dim: int) -> int:
    """An axis of a complex tensor as one of its pairs, which have one more at the end."""
    return dim - 1 if dim < 0 else dim


def _sizes(sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Sizes that are given one by one or as a list."""
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (list, tuple)) else sizes


def _product(left: Any, right: Any) -> Pair:
    if not (_is_complex(left) and _is_complex(right)):
        complex_one, real_one = (left, right) if _is_complex(left) else (right, left)
        factor = real_one[..., None] if isinstance(real_one, Tensor) else real_one
        return Pair(paired(complex_one).pairs * factor)
    (a, b), (c, d) = paired(left).pairs.unbind(-1), paired(right).pairs.unbind(-1)
    return Pair(torch.stack([a * c - b * d, a * d + b * c], -1))


def _moved(x: Any, *args: Any, **kwargs: Any) -> Pair:
    """To another dtype, of which a complex one has a real one for each part, or device."""

    def real(value: Any) -> Any:
        return value.to_real() if isinstance(value, torch.dtype) and value.is_complex else value

    return Pair(paired(x).pairs.to(*map(real, args), **{name: real(value) for name, value in kwargs.items()}))


def _gathered(x: Any, dim: int, index: Tensor) -> Pair:
    return Pair(torch.gather(paired(x).pairs, _axis(dim), index[..., None].expand(*index.shape, 2)))


def _joined(join: Any) -> Callable[..., Pair]:
    return lambda tensors, dim=0: Pair(join([paired(x).pairs for x in tensors], dim=_axis(dim)))


def _sized(method: str, last: int) -> Callable[..., Pair]:
    """A method that takes a size, or a factor, for each axis; `last`: that of the pairs' own."""
    return lambda x, *sizes: Pair(getattr(paired(x).pairs, method)(*_sizes(sizes), last))


def _kept(method: str) -> Callable[..., Pair]:
    return lambda x: Pair(getattr(paired(x).pairs, method)())


MAKING: dict[str, Callable[..., Pair]] = {
    "view_as_complex": Pair,
    "polar": lambda abs, angle: Pair(torch.stack([abs * angle.cos(), abs * angle.sin()], -1)),
}
"""Functions that make complex numbers of real ones."""
KNOWN: dict[str, Callable[..., Any]] = {
    "view_as_real": lambda x: paired(x).pairs,
    "__getitem__": lambda x, index: paired(x)[index],
    "__setitem__": lambda x, index, value: paired(x).__setitem__(index, value),
    "to": _moved,
    "gather": _gathered,
    "cat": _joined(torch.cat),
    "stack": _joined(torch.stack),
    "unsqueeze": lambda x, dim: Pair(paired(x).pairs.unsqueeze(_axis(dim))),
    "flatten": lambda x, start_dim=0, end_dim=-1: Pair(
        paired(x).pairs.flatten(_axis(start_dim), _axis(end_dim))
    ),
    "split": lambda x, sizes, dim=0: tuple(map(Pair, paired(x).pairs.split(sizes, _axis(dim)))),
    **dict.fromkeys(("mul", "__mul__", "__rmul__"), _product),
    **{method: _sized(method, 2) for method in ("reshape", "view", "expand")},
    "repeat": _sized("repeat", 1),
    **{method: _kept(method) for method in ("contiguous", "clone", "detach")},
}
"""Functions of complex tensors -> what they are of pairs."""


def _is_complex(value: Any) -> bool:
    return isinstance(value, Pair) or (isinstance(value, Tensor) and value.is_complex())


def _flat(values: Any) -> list[Any]:
    return [item for value in values for item in (value if isinstance(value, (list, tuple)) else [value])]


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {name: _each(item, change) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_each(item, change) for item in value)
    return change(value)


def _native(value: Any) -> Any:
    if not isinstance(value, Pair):
        return value
    with torch._C.DisableTorchFunction():
        return torch.view_as_complex(value.pairs)


def _as_pair(value: Any) -> Any:
    if not (isinstance(value, Tensor) and value.is_complex()):
        return value
    with torch._C.DisableTorchFunction():
        return Pair(torch.view_as_real(value.resolve_conj() if value.is_conj() else value))

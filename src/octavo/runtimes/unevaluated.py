"""A trace records what a network computes and not what comes out, so its products need not be evaluated.

Tracing Stable Diffusion 1.5's U-Net evaluates it once: a third of its first conversion's time on two threads. Within
`unevaluated` a product's output is memory that is never written into, and so is what is computed from it: only shapes,
strides and dtypes are found, on torch's meta device. What depends on no product, such as tables of positions and of
timesteps, is evaluated as ever, for a network may make Python's numbers of it. One that makes numbers of the rest, or
computes what is not known here, is told by `NeedsValues`, and is evaluated after all (`octavo.runtimes.tried_trace`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from octavo.runtimes.held import NUMBERS

aten = torch.ops.aten
PRODUCTS = {
    *(aten._convolution, aten.linear, aten.matmul, aten.mm, aten.addmm, aten.bmm, aten.baddbmm),
    *(aten.scaled_dot_product_attention, getattr(aten, "_scaled_dot_product_flash_attention_for_cpu", None)),
}
"""Operations that cost nearly all of an evaluation; beside them all that reads int8, which are weights here."""
CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
ORDER = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
TRANSPOSED_ORDER = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1}
UNRECORDED = {
    *(aten.convolution, aten.lstm_cell, aten.gru_cell, aten.rnn_tanh_cell, aten.rnn_relu_cell),
    *(getattr(aten, function.__name__) for function in (*CONVOLUTIONS, *TRANSPOSED)),
}
"""Of which a trace records what they consist of, and not themselves."""
COPYING = {"tensor", "as_tensor", "asarray", "new_tensor", "from_dlpack", "__dlpack__", "__deepcopy__"}
"""Functions of torch that copy values past its dispatcher."""
OF_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class NeedsValues(Exception):
    """The network has to be evaluated."""


@contextmanager
def unevaluated(memory: Unwritten | None = None) -> Iterator[None]:
    """Within the block products, and what is computed from them, have shapes and dtypes but no values.

    Raises `NeedsValues` where these are asked for, and at what is not known here.

    >>> with torch.inference_mode(), unevaluated():
    ...     y = torch.ones(3, 2) @ torch.ones(2, 5) + 1
    ...     y.softmax(-1).shape, bool(y.sum() > 0)
    Traceback (most recent call last):
    ...
    octavo.runtimes.unevaluated.NeedsValues: __bool__
    """
    memory = memory or Unwritten()
    with _Functions(memory), _Operations(memory):
        yield


class Unwritten:
    """Memory that all tensors without values lie in, over each other: by it they are told from others."""

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []
        self._addresses: set[int] = set()
        self._watched: list[StorageWeakRef] = []
        self.was_asked = False
        self.stopped = False

    def asked(self, why: str) -> NeedsValues:
        """The error for the network that asks, which may catch it and go on by its answer: so it is noted."""
        self.was_asked = True
        return NeedsValues(why)

    def is_kept(self) -> bool:
        """Whether somebody else holds it still. It is let go of here."""
        self._watched += [StorageWeakRef(memory.untyped_storage()) for memory in self._kept]
        self._kept.clear()
        return not all(watched.expired() for watched in self._watched)

    def goes_on(self) -> None:
        if self.stopped:
            raise NeedsValues("stopped")

    def holds(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in self._addresses

    def like(self, value: Any) -> Any:
        """A tensor of the same shape, strides and dtype, without values."""
        if not isinstance(value, torch.Tensor):
            return value
        size = value.untyped_storage().nbytes()
        if not self._kept or size > len(self._kept[-1]):
            self._kept.append(torch.empty(2 * size + 64, dtype=torch.uint8))
            self._addresses.add(self._kept[-1].untyped_storage().data_ptr())
        storage = self._kept[-1].untyped_storage()
        return torch.empty(0, dtype=value.dtype).set_(storage, 0, value.size(), value.stride())


class _Functions(TorchFunctionMode):
    """Convolutions as traces record them; and numbers that are made of a tensor past torch's dispatcher."""

    def __init__(self, memory: Unwritten) -> None:
        super().__init__()
        self._memory = memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._memory.goes_on()
        for functions in (CONVOLUTIONS, TRANSPOSED):
            if func in functions:
                axes, transposed = functions.index(func) + 1, functions is TRANSPOSED
                output = _convolution(axes, transposed, *args, **kwargs)
                return func(*args, **kwargs) if output is None else output
        name = getattr(func, "__name__", "")
        if (name in NUMBERS and self._memory.holds(args[0])) or (
            name in COPYING and any(map(self._memory.holds, tree_leaves((args, kwargs))))
        ):
            raise self._memory.asked(name)
        return func(*args, **kwargs)


def _convolution(axes: int, transposed: bool, *args: Any, **kwargs: Any) -> torch.Tensor | None:
    """`torch.conv1d` to `conv3d`, or `conv_transpose1d` to 3d, by the operation that they consist of.

    None of named padding, and of one image.
    """
    given = {**DEFAULTS, **dict(zip(TRANSPOSED_ORDER if transposed else ORDER, args, strict=False)), **kwargs}
    if isinstance(given["padding"], str) or given["input"].dim() != axes + 2:
        return None
    strides, paddings, dilations, output_paddings = (
        list(size) * (axes // len(size)) if isinstance(size, (list, tuple)) else [size] * axes
        for size in (given["stride"], given["padding"], given["dilation"], given["output_padding"])
    )
    operands = given["input"], given["weight"], given["bias"]
    switches = (False, False, True, True)  # of cuDNN, as traces record them
    return torch._convolution(
        *operands, strides, paddings, dilations, transposed, output_paddings, given["groups"], *switches
    )


class _Operations(TorchDispatchMode):
    def __init__(self, memory: Unwritten) -> None:
        super().__init__()
        self._memory = memory
        self._found: dict[Any, Any] = {}  # what operations gave on the meta device, which takes a while

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # what is done here is no function of the network's
            return self._answered(func, args, kwargs or {})

    def _answered(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._memory.goes_on()
        if func.overloadpacket in UNRECORDED:
            raise self._memory.asked(str(func))
        flat, structure = tree_flatten((args, kwargs))
        without = any(map(self._memory.holds, flat))
        if not without and not _is_product(func, flat):
            return func(*args, **kwargs)
        if OF_VALUES.intersection(func.tags) and not _is_by_positions(func, flat):
            raise self._memory.asked(str(func))
        if func._schema.is_mutable:
            return self._written(func, args)
        if any(argument.alias_info is not None for argument in func._schema.arguments):
            return self._viewed(func, args, kwargs)
        if func is aten.fake_quantize_per_tensor_affine.default:  # whose numbers differ from layer to layer
            return self._memory.like(_on_meta(args[0]))
        key = func, structure, tuple(map(_kind_of, flat))
        if key not in self._found:
            try:
                self._found[key] = func(*tree_map(_on_meta, args), **tree_map(_on_meta, kwargs))
            except Exception as error:  # whatever the meta device has no answer to
                raise self._memory.asked(str(func)) from error
        return tree_map(self._memory.like, self._found[key])

    def _written(self, func: Any, args: Any) -> Any:
        """What an operation gives that writes into its first argument: that, as it is."""
        writes = [argument.alias_info is not None for argument in func._schema.arguments]
        if sum(writes) != 1 or not writes[0] or len(func._schema.returns) != 1:
            raise self._memory.asked(str(func))
        if torch.Tag.inplace_view in func.tags:  # a write of another shape
            raise self._memory.asked(str(func))
        if not self._memory.holds(args[0]):  # which others may be views of
            raise self._memory.asked(f"{func} into a tensor with values")
        return args[0]

    def _viewed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operation gives that may be a view: of a tensor with values, as it is."""
        if any(map(self._memory.holds, args[1:])) and not func.overloadpacket.__name__.endswith("_as"):
            raise self._memory.asked(f"{func} by values")
        view = func(*args, **kwargs)
        if not self._memory.holds(args[0]):
            return view
        return view if self._memory.holds(view) else tree_map(self._memory.like, view)


def _is_product(func: Any, flat: list[Any]) -> bool:
    return func.overloadpacket in PRODUCTS or any(
        isinstance(value, torch.Tensor) and value.dtype == torch.int8 for value in flat
    )


def _is_by_positions(func: Any, flat: list[Any]) -> bool:
    """Whether it is an indexing, as torch says of unknown size, that takes no mask and so has a known one."""
    masks = (torch.bool, torch.uint8)
    return func is aten.index.Tensor and not any(
        value.dtype in masks for value in flat[1:] if isinstance(value, torch.Tensor)
    )


def _kind_of(value: Any) -> Any:
    """All of an argument that shapes depend on."""
    if isinstance(value, torch.Tensor):
        return value.size(), value.stride(), value.dtype
    return type(value), value  # for 1, 1.0 and True are equal


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) else value

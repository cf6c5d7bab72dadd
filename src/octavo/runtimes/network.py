"""A network's modules apart from its tensors: copies that share memory, and code that a cache cannot name."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from octavo.calibration import operations
from octavo.fingerprint import HOOKS
from octavo.quantization.attention_calls import IntegerAttention

KNOWN = {
    *("torch", "diffusers", "transformers", "peft", "accelerate", "octavo"),
    *("", "builtins", "functools", "operator", "math", "numpy"),
}
"""Packages whose code changes with their version alone; "" is that of functions built into Python or torch."""
OFFLOADING = ("_hf_hook", "forward", "_old_forward")
"""What `accelerate` sets on a module that it offloads."""

Module = TypeVar("Module", bound=nn.Module)


def shared_copy(network: Module) -> Module:
    """A copy with modules, parameters and buffers of its own, which share the memory of the original's.

    Casting, moving or editing the modules of one leaves the other as it was; writing into a tensor in place
    (`load_state_dict`, an optimizer) reaches both. Offloading (`accelerate`'s hooks) stays with the original.

    >>> import torch
    >>> network = nn.Linear(2, 2)
    >>> other = shared_copy(network)
    >>> other.weight.data_ptr() == network.weight.data_ptr()
    True
    >>> other.to(torch.bfloat16).weight.dtype, network.weight.dtype
    (torch.bfloat16, torch.float32)
    """
    memo: dict[int, Any] = {}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    for buffer in network.buffers():
        memo[id(buffer)] = buffer.detach()
    for module in network.modules():
        if (hook := vars(module).get(OFFLOADING[0])) is not None:
            memo[id(hook)] = hook  # which knows the network that is moved before, with all its weights
    other = copy.deepcopy(network, memo)
    for module in other.modules():
        if _only_offloads(module):
            _drop_offloading(module)
    return other


def evaluated_by(network: Module, forward: Callable[..., Any]) -> Module:
    """`shared_copy` whose `forward` is another, which evaluates the network's hooks too: the copy has none of its own.

    >>> network = nn.Linear(1, 1)
    >>> _ = network.register_forward_hook(lambda module, args, output: output + 1)
    >>> other = evaluated_by(network, network)
    >>> import torch
    >>> torch.equal(other(torch.ones(1)), network(torch.ones(1)))
    True
    """
    other = shared_copy(network)
    other.__dict__["_forward_hooks"] = OrderedDict()
    other.__dict__["_forward_pre_hooks"] = OrderedDict()
    # A pipeline that offloads takes its hooks off after each call, which brings `_old_forward` back, and on again.
    _drop_offloading(other)
    other.__dict__["forward"] = forward
    return other


@contextmanager
def computing_by(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within the block each module computes by another `forward`; none may have one of its own beside its class's."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


def float32_copy(network: Module) -> Module:
    """`shared_copy` whose floating tensors are float32: only those that were not take new memory.

    Integers and the float32 scales of quantized layers stay as they are. It is in evaluation mode, as converters take
    every network (a LoRA's layers are not always, in a network that is).
    """
    other = shared_copy(network)
    nn.Module.eval(other)
    nn.Module.float(other)  # diffusers' own `float` refuses quantized models
    return other


def _only_offloads(module: nn.Module) -> bool:
    """Whether the `forward` set on a module is its class's own between `accelerate`'s hooks, which move tensors."""
    if not all(name in vars(module) for name in OFFLOADING):
        return False
    hook, forward, _ = (vars(module)[name] for name in OFFLOADING)
    hooks = getattr(hook, "hooks", (hook,))  # of one that calls several
    return (
        all(type(one).__module__ == "accelerate.hooks" for one in hooks)
        and isinstance(forward, functools.partial)
        and is_by_its_class(module)
    )


def is_by_its_class(module: nn.Module) -> bool:
    """Whether a module computes by its class's `forward`, offloaded or not.

    >>> layer = nn.Linear(1, 1)
    >>> is_by_its_class(layer)
    True
    >>> layer.forward = print
    >>> is_by_its_class(layer)
    False
    """
    forward = vars(module).get("_old_forward", module.forward)
    return getattr(forward, "__func__", None) is type(module).forward


def _drop_offloading(module: nn.Module) -> None:
    for name in OFFLOADING:
        vars(module).pop(name, None)


def has_foreign_code(network: nn.Module) -> bool:
    """Whether the network computes something that neither its libraries' versions nor Octavo account for.

    A module, an attention processor or another object of a class of the user's own, a function of such, also in place
    of a library's method, a forward hook that is not Octavo's, or a `forward` set on one module: its code may change
    without a sign.
    """
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        return True
    codes = ((type(m), type(m).forward, *_called_by(m)) for m in network.modules())
    if any(_is_of_user(code) for of_module in codes for code in of_module):
        return True
    hooks = (
        hook for module in network.modules() for kind in HOOKS for hook in getattr(module, kind).values()
    )
    if any(getattr(hook, "__module__", None) != operations.__name__ for hook in hooks):
        return True
    forwards = (vars(module)["forward"] for module in network.modules() if "forward" in vars(module))
    return any(not isinstance(forward, IntegerAttention) for forward in forwards)


def _called_by(module: nn.Module) -> Iterator[Any]:
    """Functions among a module's attributes, and classes of other objects there that can be called."""
    for value in vars(module).values():
        while isinstance(value, functools.partial):
            value = value.func
        if callable(value):
            yield value if hasattr(value, "__qualname__") else type(value)
            if not isinstance(value, nn.Module) and hasattr(type(value).__call__, "__module__"):
                yield type(value).__call__


def _is_of_user(code: Any) -> bool:
    return (code.__module__ or "").partition(".")[0] not in KNOWN

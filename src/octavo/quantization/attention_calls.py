"""Attention where a network calls it: every call of torch's `scaled_dot_product_attention`, seen or replaced.

Diffusers' attention modules differ in everything but their last step, a call of that one function. A module owns the
calls that are made while it, and no module inside it, is running. Its attention in integers is a child module of it
(`octavo_attention`), which stands in for torch's function until the owner's `forward` returns; the owner's own code is
run as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from octavo.errors import OctavoError
from octavo.quantization.attention import AttentionSpecs, QuantAttention, QuantProduct

ATTRIBUTE = "octavo_attention"

See = Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor], None]


@contextmanager
def attention_calls(model: nn.Module, see: See) -> Iterator[None]:
    """Within the block, `see(owner's dotted name, query, key, value)` of each attention that `model` computes.

    >>> class Owner(nn.Module):
    ...     def forward(self, x):
    ...         return F.scaled_dot_product_attention(x, x, x)
    >>> model = nn.Sequential(Owner())
    >>> with attention_calls(model, lambda owner, query, key, value: print(owner, tuple(query.shape))):
    ...     _ = model(torch.ones(4, 2))
    0 (4, 2)
    """
    running: list[str] = []

    def entering(name: str) -> Callable[..., None]:
        return lambda module, args: running.append(name)

    def leaving(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    hooks: list[Any] = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(entering(name)))
        hooks.append(module.register_forward_hook(leaving, always_call=True))

    def seen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if running:
            see(running[-1], query, key, value)
        return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)

    try:
        with _Attention(seen):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def attach_attention(
    model: nn.Module,
    specs: Mapping[str, AttentionSpecs],
    scales: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    device: Any = None,
) -> None:
    """Let each module of `specs`, by dotted name, compute its attention in integers from now on. Mutates `model`.

    `scales`: owner -> float32 [] of "query", "key" and "value"; without them for loading into. An owner within an owner
    must be given too, else the outer one's scales serve both. Raises `OctavoError` when the model has no such module.
    From then on a `forward` of an owner that computes its attention by anything but torch's function raises
    `OctavoError`: it would be in float, unseen.
    """
    modules = dict(model.named_modules())
    for name, of_owner in specs.items():
        if name not in modules:
            raise OctavoError(
                f"{name}: {type(model).__name__} has no such module to quantize the attention of"
            )
        owner = modules[name]
        owner.add_module(
            ATTRIBUTE,
            QuantAttention(of_owner, scales[name] if scales else None, device).train(owner.training),
        )
        owner.forward = IntegerAttention(owner)


def detach_attention(model: nn.Module) -> None:
    """Undo `attach_attention`: torch's own attention again, in float. Mutates `model`."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), IntegerAttention):
            del module.forward
            delattr(module, ATTRIBUTE)


def quantized_products(model: nn.Module) -> Iterator[tuple[str, QuantProduct]]:
    """Yield `(dotted name, product)` of both products of every attention in integers, in the model's order.

    >>> model = nn.Sequential(nn.Identity())
    >>> attach_attention(model, {"0": AttentionSpecs.of_bits(8)})
    >>> [(name, product_name(name)) for name, _ in quantized_products(model)]
    [('0.octavo_attention.qk', '0.qk'), ('0.octavo_attention.pv', '0.pv')]
    """
    for name, module in model.named_modules():
        if isinstance(module, QuantProduct):
            yield name, module


def product_name(name: str) -> str:
    """What people read of a product's dotted name: its owner's, and `qk` or `pv`."""
    return name.replace(f"{ATTRIBUTE}.", "")


class IntegerAttention:
    """The `forward` of an owner whose attention is in integers: its class's own, with torch's function replaced.

    An attribute of the module and not a pair of hooks, so that whatever interrupts the owner also ends the replacement.
    """

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        calls = 0

        def replaced(*operands: Any, **options: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            attention: torch.Tensor = getattr(self.owner, ATTRIBUTE)(*operands, **options)
            return attention

        with _Attention(replaced):
            output = type(self.owner).forward(self.owner, *args, **kwargs)
        if not calls:
            raise OctavoError(
                f"{type(self.owner).__name__}: its attention is quantized, but did not call torch's "
                "scaled_dot_product_attention; give it back the attention processor or backend it was calibrated with"
            )
        return output


class _Attention(TorchFunctionMode):
    """Within the block, on this thread, calls of torch's attention go to `function`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # torch switches the mode off while this runs
        called = self.function if func is F.scaled_dot_product_attention else func
        return called(*args, **(kwargs or {}))

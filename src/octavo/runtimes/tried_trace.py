"""A trace without an evaluation is tried first, in a thread of its own; the network is left as it was where it fails.

Whatever goes wrong, the caller traces it again with an evaluation. Networks with code of the user's own are not tried:
they may keep what they computed, which has no values, and read it later.
"""

from __future__ import annotations

import contextvars
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import nn

from octavo.errors import OctavoError
from octavo.runtimes.unevaluated import Unwritten, unevaluated

Result = TypeVar("Result")


def tried(
    network: nn.Module, trace: Callable[[Callable[[], AbstractContextManager[None]]], Result]
) -> Result | None:
    """What `trace` gives without an evaluation of `network`; None where that cannot be had, for whatever reason.

    `trace` is given the context that the network is to be called in. It runs in a thread of its own: torch's tracer
    keeps what an error left in it, a thread at a time. Where there is no result, what was set as an attribute of a
    module is taken back. Raises `OctavoError` as the network does, or if it keeps a tensor without values elsewhere.
    """
    if torch.is_autocast_enabled("cpu") or _has_modes():
        return None  # which belong to this thread
    before = _attributes(network)
    memory = Unwritten()
    result, error = None, None
    try:
        with ThreadPoolExecutor(1) as thread:
            try:
                done = thread.submit(contextvars.copy_context().run, _traced, trace, memory)
                error = done.exception()
            except BaseException:  # Ctrl-C
                memory.stopped = True
                raise
        result = done.result() if error is None and not memory.was_asked else None
    finally:
        if result is None or memory.is_kept():
            result = None
            _take_back(before)
    if error is not None and isinstance(error.__cause__, OctavoError) and not memory.was_asked:
        raise error
    del done, error
    if memory.is_kept():
        gc.collect()
        if memory.is_kept():
            raise OctavoError(
                f"{type(network).__name__}: it keeps what it computes, and its graph would be wrong; sample it in "
                "torch, without accelerate (--runtime torch)"
            )
    return result


def _traced(trace: Callable[..., Result], memory: Unwritten) -> Result:
    with torch.inference_mode():
        return trace(lambda: unevaluated(memory))


def _has_modes() -> bool:
    return bool(torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack())


def _attributes(network: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each module's attributes, parameters and buffers: the dicts themselves, and what is in them."""
    owns = [
        own
        for module in network.modules()
        for own in (vars(module), module._parameters, module._buffers, module._modules)
    ]
    return [(own, dict(own)) for own in owns]


def _take_back(before: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    for own, values in before:
        own.update(values)
        for name in own.keys() - values.keys():
            del own[name]

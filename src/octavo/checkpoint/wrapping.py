"""A method of diffusers wrapped in one of Octavo's, once, and the original found again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

ORIGINAL = "octavo_original"


def original(method: Any) -> Callable[..., Any]:
    """Diffusers' own of a method that was wrapped here; any other as it is."""
    found: Callable[..., Any] = getattr(method, ORIGINAL, method)
    return found


def wrap(kind: Any, name: str, wrapping: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put `wrapping(method)` in the place of a method, or of a class method, once."""
    method = vars(kind)[name]
    if hasattr(getattr(kind, name), ORIGINAL):
        return
    function = method.__func__ if isinstance(method, classmethod) else method
    wrapped = functools.wraps(function)(wrapping(function))
    setattr(wrapped, ORIGINAL, function)
    setattr(kind, name, classmethod(wrapped) if isinstance(method, classmethod) else wrapped)

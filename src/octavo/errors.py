"""The one error a user is meant to read."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

LONGEST = 100
"""Characters of a value that a line quotes."""


class OctavoError(ValueError):
    """What went wrong and what mends it, in one line that names the file or the argument.

    The command line prints the message and exits with code 2; in Python it is an ordinary `ValueError`.

    >>> raise OctavoError("bits: 9 is not between 2 and 8")
    Traceback (most recent call last):
        ...
    octavo.errors.OctavoError: bits: 9 is not between 2 and 8
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def quoted(value: Any) -> str:
    """`repr(value)`, of which a long one is cut off: what a damaged file holds may be of any length.

    >>> quoted("bits"), quoted([1] * 1000)[-8:], len(quoted("a" * 1000))
    ("'bits'", ', 1, ...', 102)
    """
    if isinstance(value, str):
        return repr(value if len(value) <= LONGEST else f"{value[: LONGEST - 3]}...")
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def check_whole(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise `OctavoError` unless `value` is a whole number from `low` (to `high`).

    >>> check_whole("threads", 1.5, 1)
    Traceback (most recent call last):
        ...
    octavo.errors.OctavoError: threads: 1.5 is not a whole number from 1
    """
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < low or (high is not None and value > high):
        until = "" if high is None else f" to {high}"
        raise OctavoError(f"{name}: {quoted(value)} is not a whole number from {low}{until}")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise `OctavoError` unless `value` is one of `choices`.

    >>> check_choice("format", "onnx", ("openvino", "onnx"))
    """
    if value not in choices:
        raise OctavoError(f"{name}: {quoted(value)} is not one of {', '.join(choices)}")

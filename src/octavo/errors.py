"""The one error a user is meant to read."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


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


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise `OctavoError` unless `value` is one of `choices`.

    >>> check_choice("format", "onnx", ("openvino", "onnx"))
    """
    if value not in choices:
        raise OctavoError(f"{name}: {value!r} is not one of {', '.join(choices)}")

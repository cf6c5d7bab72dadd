"""The one error a user is meant to read."""

from __future__ import annotations


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

"""What diffusers reads of a scheduler's settings: the signature of its `__init__`, ours added to its base's."""

from __future__ import annotations

import inspect
from typing import Any


def announce_settings(kind: Any, *names: str) -> None:
    """Let `kind.__init__`, which takes its base's settings as *args and **kwargs, tell of them and of `names`, its own.

    Diffusers looks there for the settings that a scheduler has; what is not there it drops with a warning.
    """
    own = inspect.signature(kind.__init__).parameters
    signature = inspect.signature(kind.__mro__[1].__init__)
    kind.__init__.__signature__ = signature.replace(
        parameters=[*signature.parameters.values(), *(own[name] for name in names)]
    )

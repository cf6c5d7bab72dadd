"""OpenVINO's core, made so that signals are heard after it has gone.

A core's plugin for CPUs gives the thread that loads it a stack for signals, and at its end unmaps it and gives back the
one that it had found, if its own is still there (2026.4). Of two that end in the order in which they began, the second
gives back the first's, which is gone: the next signal that Python handles, such as Ctrl-C, ends the process by a
segmentation fault. So the thread's own is given back at once: the plugin's end then leaves it alone.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from octavo.errors import OctavoError

if TYPE_CHECKING:
    import openvino


DISABLED = 2
"""`SS_DISABLE`: there is none, and handlers run on the thread's ordinary stack."""


class _Stack(ctypes.Structure):
    """`stack_t` of Linux."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def own_stack() -> Iterator[None]:
    """Within the block cores may be made; behind it the thread's stack for signals is as it was before.

    Unless that is smaller than the plugin's: processors with AMX need a large one.
    """
    if sys.platform != "linux":
        yield
        return
    library, before, after = ctypes.CDLL(None), _Stack(), _Stack()
    library.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        library.sigaltstack(None, ctypes.byref(after))
        if before.flags & DISABLED or before.size >= after.size:
            library.sigaltstack(ctypes.byref(before), None)


def openvino_core() -> openvino.Core:
    """A core with its plugin for CPUs loaded. Raises `OctavoError` where OpenVINO cannot be imported."""
    package = import_openvino()
    with own_stack():
        core: openvino.Core = package.Core()
        core.get_property("CPU", "FULL_DEVICE_NAME")  # which loads the plugin
    return core


def import_openvino() -> Any:
    """The package. Raises `OctavoError` where it cannot be imported."""
    try:
        import openvino
    except ImportError as error:
        raise OctavoError(f"OpenVINO cannot be imported ({error}): pip install openvino") from error
    return openvino

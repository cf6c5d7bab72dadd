"""OpenVINO's core: one for the whole process, and never let go.

Each core's plugin for CPUs gives the thread that makes it a stack of its own for signals, and at its end gives back
the one that it had found (2026.4). Of two that end in the order in which they began, the second gives back the
first's, which is gone: the next signal that Python handles, such as Ctrl-C, ends the process by a segmentation fault.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

from octavo.errors import OctavoError

if TYPE_CHECKING:
    import openvino

_cores: dict[int, openvino.Core] = {}  # by process: one made by fork has none of its parent's threads
_MAKING = threading.Lock()


def openvino_core() -> openvino.Core:
    """The core of this process, made at first use. Raises `OctavoError` where OpenVINO cannot be imported."""
    process = os.getpid()
    if process not in _cores:
        with _MAKING:
            if process not in _cores:
                core = import_openvino().Core()
                core.get_property("CPU", "FULL_DEVICE_NAME")  # which loads the plugin
                _cores[process] = core
    return _cores[process]


def import_openvino() -> Any:
    """The package. Raises `OctavoError` where it cannot be imported."""
    try:
        import openvino
    except ImportError as error:
        raise OctavoError(f"OpenVINO cannot be imported ({error}): pip install openvino") from error
    return openvino

"""Quantized pipelines as ordinary diffusers folders: save, load, register with diffusers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.checkpoint.config import OctavoConfig as OctavoConfig
    from octavo.checkpoint.loading import load as load
    from octavo.checkpoint.registration import register as register
    from octavo.checkpoint.save import float32_bytes as float32_bytes
    from octavo.checkpoint.save import prepare_to_save as prepare_to_save
    from octavo.checkpoint.save import save_pipeline as save_pipeline
    from octavo.checkpoint.save import tensor_bytes as tensor_bytes

_PLACES = {
    "OctavoConfig": "config",
    "load": "loading",
    "register": "registration",
    "float32_bytes": "save",
    "prepare_to_save": "save",
    "save_pipeline": "save",
    "tensor_bytes": "save",
}


def __getattr__(name: str) -> Any:
    """Imported when asked for: `import octavo` needs no more of this room than its registration."""
    if name not in _PLACES:
        raise AttributeError(f"module 'octavo.checkpoint' has no attribute {name!r}")
    return getattr(importlib.import_module(f"octavo.checkpoint.{_PLACES[name]}"), name)

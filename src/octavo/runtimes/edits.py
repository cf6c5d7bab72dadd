"""Methods by which diffusers edits a network, refused where an engine executes it as it was."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from octavo.errors import OctavoError

EDITS = (
    "enable_freeu",
    "disable_freeu",
    "enable_cache",
    "set_attn_processor",
    "load_attn_procs",
    "_load_ip_adapter_weights",
    "load_lora_adapter",
    "add_adapter",
    "set_adapters",
    "set_adapter",
    "enable_adapters",
    "disable_adapters",
    "delete_adapters",
    "enable_lora",
    "disable_lora",
    "fuse_lora",
    "unfuse_lora",
    "unload_lora",
)
"""Those that change what the network computes; a pipeline's own (`enable_freeu`, `set_adapters`) come down to them."""


def refuse_edits(network: nn.Module) -> None:
    """Let the methods of `EDITS` that this network has raise `OctavoError`: the engine would never see their effect.

    Set on the one network, not on its class, so that the original is edited as before.
    """
    for name in EDITS:
        if hasattr(type(network), name):
            network.__dict__[name] = functools.partial(_refuse, type(network).__name__, name)


def _refuse(network: str, edit: str, *args: Any, **kwargs: Any) -> None:
    raise OctavoError(
        f"{edit.lstrip('_')}: this {network} is accelerated as it was, and is not edited; edit the original pipeline, "
        "then accelerate that"
    )

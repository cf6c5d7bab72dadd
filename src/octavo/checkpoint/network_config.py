"""Entries of a network's configuration, put there without losing what diffusers has set beside them."""

from __future__ import annotations

from typing import Any

from torch import nn

from octavo.errors import OctavoError


def register(network: nn.Module, **entries: Any) -> None:
    """Put `entries` into the network's configuration: diffusers' `register_to_config`, which loses `set_beside`."""
    beside = {key: value for key, value in set_beside(network).items() if key not in entries}
    put: Any = network.register_to_config
    put(**entries)
    for key, value in beside.items():
        setattr(network.config, key, value)


def set_beside(network: nn.Module) -> dict[str, Any]:
    """Settings that are an attribute of the configuration and not its entry, and so are never saved.

    Diffusers sets one where it loads an IP-Adapter, `config.encoder_hid_dim_type = "ip_image_proj"`, by which the
    network's `forward` decides whether it reads the picture.
    """
    config: Any = network.config
    found = {key: getattr(config, key, value) for key, value in config.items()}
    return {key: value for key, value in found.items() if value is not config[key]}


def check_saveable(network: nn.Module) -> None:
    """Raise `OctavoError` for a network with an IP-Adapter, which would be loaded without it.

    A configuration has no place for one (diffusers saves it as little).
    """
    if any("IPAdapter" in type(module).__name__ for module in network.modules()):
        raise OctavoError(
            f"IP-Adapter: a {type(network).__name__} cannot be saved with one; quantize with "
            "exclude=['encoder_hid_proj.*', '*_ip.*'], unload_ip_adapter(), save, and load_ip_adapter() once loaded"
        )

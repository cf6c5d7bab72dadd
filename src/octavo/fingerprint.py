"""A name for a network's exact contents, so that what was compiled from it can be found again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def fingerprint(denoiser: nn.Module, *extra: str) -> str:
    """SHA-256 (first 32 hex digits) of everything that decides what `denoiser` computes, and of `extra`.

    That is its configuration; every tensor of its state; the class, the mode, the plain public attributes and
    the names of the forward hooks of each of its modules; the versions of diffusers and Octavo. What a hook does
    is not seen, only what it is called.

    >>> network = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    >>> before = fingerprint(network)
    >>> fingerprint(network) == before, fingerprint(network.eval()) == before
    (True, False)
    """
    digest = hashlib.sha256()
    config = {key: value for key, value in dict(getattr(denoiser, "config", {})).items() if key[:1] != "_"}
    versions = (_version(package) for package in ("diffusers", "octavo"))
    for text in (json.dumps(config, sort_keys=True, default=repr), *versions, *extra):
        digest.update(text.encode() + b"\0")
    for name, module in denoiser.named_modules():
        digest.update("\n".join((name, *_traits(module))).encode() + b"\0")
    for name, tensor in denoiser.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _traits(module: nn.Module) -> Iterator[str]:
    """What a module is besides its tensors, its mode (`training`) among the attributes."""
    yield _path(type(module))
    for key, value in sorted(vars(module).items()):
        if not key.startswith("_"):
            yield f"{key}={_described(value)}"
    for kind in HOOKS:
        yield from (f"{kind} {_described(hook)}" for hook in getattr(module, kind).values())


def _described(value: Any) -> str:
    """A plain value by its contents, anything else by what it is: no addresses, which change with each start."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_described, value))}]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return f"{_path(type(value))}({', '.join(f'{name}={_described(item)}' for name, item in fields)})"
    return _path(value if hasattr(value, "__qualname__") else type(value))


def _path(named: Any) -> str:
    return f"{getattr(named, '__module__', '?')}.{named.__qualname__}"


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:  # run from its sources
        return package

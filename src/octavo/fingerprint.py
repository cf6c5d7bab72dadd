"""A name for a network's exact contents, so that what was compiled from it can be found again."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn


def fingerprint(denoiser: nn.Module, *extra: str) -> str:
    """SHA-256 (first 32 hex digits) of the class, the configuration and every tensor of `denoiser`, and `extra`."""
    digest = hashlib.sha256()
    config = {key: value for key, value in dict(getattr(denoiser, "config", {})).items() if key[:1] != "_"}
    for text in (type(denoiser).__qualname__, json.dumps(config, sort_keys=True, default=repr), *extra):
        digest.update(text.encode() + b"\0")
    for name, tensor in denoiser.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]

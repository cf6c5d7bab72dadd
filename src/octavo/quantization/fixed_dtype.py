"""Modules whose buffers keep their dtype: scales stay float32 and integers stay integers when a model is cast."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class FixedDtype(nn.Module):
    """A module whose buffers move between devices but keep their dtype through `.to(dtype)`, `.half()`."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FixedDtype:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

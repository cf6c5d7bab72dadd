"""A tensor rounded to integers and back in the middle of a network that stays in float."""

from __future__ import annotations

from typing import Any

import torch

from octavo.quantization.affine import fake_quantize
from octavo.quantization.fixed_dtype import FixedDtype
from octavo.quantization.specs import QParams, QuantSpec


class FakeQuantizer(FixedDtype):
    """`s (clamp(round(x / s) + z) - z)` of any tensor, in its own dtype (PTQ4DM 3.2: mu, Sigma, x_{t-1}).

    Buffers `scale` float32 [] and `zero_point` int32 [] keep their dtype when the model is cast. Without
    `qparams` they are uninitialised on `device`, for loading into.

    >>> qparams = QParams(torch.tensor(0.5), torch.tensor(0, dtype=torch.int32))
    >>> FakeQuantizer(QuantSpec(), qparams)(torch.tensor([0.6, 100.0]))
    tensor([ 0.5000, 63.5000])
    """

    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, spec: QuantSpec, qparams: QParams | None = None, device: Any = None) -> None:
        super().__init__()
        self.spec = spec
        if qparams is None:
            qparams = QParams(
                torch.empty((), dtype=torch.float32, device=device),
                torch.empty((), dtype=torch.int32, device=device),
            )
        self.register_buffer("scale", qparams.scale.to(device, copy=True))
        self.register_buffer("zero_point", qparams.zero_point.to(device, copy=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Round `x`, any shape and float dtype."""
        return fake_quantize(x, QParams(self.scale, self.zero_point), self.spec)

    def extra_repr(self) -> str:
        return f"bits={self.spec.bits}, symmetric={self.spec.symmetric}"

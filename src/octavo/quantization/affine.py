"""The affine map between floats and integers, bit for bit as torch's own fake quantization computes it."""

from __future__ import annotations

import torch

from octavo.errors import OctavoError
from octavo.quantization.specs import QParams, QuantSpec

SMALLEST_SCALE = 2.0**-60
"""Floor of every scale: a product of two still is a normal float32, and its reciprocal is finite."""


def qparams_from_range(spec: QuantSpec, low: torch.Tensor | float, high: torch.Tensor | float) -> QParams:
    """The parameters whose integers span `[low, high]`, widened to contain 0 so that 0 stays exactly 0.

    Symmetric: `scale = max(-low, high) / qmax`, zero point 0. Asymmetric: `scale = (high - low) / (qmax -
    qmin)`, `zero_point = qmin - round(low / scale)`. `low`, `high`: `[]` or `[C]`; computed in float64, then
    rounded to float32. The scale never falls below 2^-60, so a range of zeros is safe. Raises `OctavoError`
    when an end is not finite or low > high.

    >>> qparams_from_range(QuantSpec(bits=8, symmetric=False), -1.0, 1.55)
    QParams(scale=tensor(0.0100), zero_point=tensor(100, dtype=torch.int32))
    """
    low = torch.as_tensor(low).double()
    high = torch.as_tensor(high).double()
    if not bool((low.isfinite() & high.isfinite() & (low <= high)).all()):
        raise OctavoError(
            f"range: [{low.min():g}, {high.max():g}] must be finite, its low end not above its high"
        )
    return _qparams(spec, low, high)


def _qparams(spec: QuantSpec, low: torch.Tensor, high: torch.Tensor) -> QParams:
    """`qparams_from_range` for float64 ends known to be good: the search calls it in its inner loop."""
    if spec.is_float:
        return QParams(torch.ones_like(low).float(), torch.zeros_like(low).int())
    low, high = low.clamp(max=0), high.clamp(min=0)
    if spec.symmetric:
        scale = torch.maximum(-low, high) / spec.qmax
        scale = scale.clamp(min=SMALLEST_SCALE).float()
        return QParams(scale, torch.zeros_like(scale, dtype=torch.int32))
    scale = (high - low) / (spec.qmax - spec.qmin)
    scale = scale.clamp(min=SMALLEST_SCALE).float()
    zero_point = (spec.qmin - torch.round(low / scale)).clamp(spec.qmin, spec.qmax)
    return QParams(scale, zero_point.int())


def quantize(x: torch.Tensor, qparams: QParams, spec: QuantSpec) -> torch.Tensor:
    """`clamp(round(x / s) + z, qmin, qmax)` as integers (PTQ4DM eq. 1), computed in float32.

    `x`: any shape and float dtype; with `[C]` parameters its dimension 0 has C entries. Returns `spec.dtype`,
    same shape. The division is a product with the float32 reciprocal, as in torch's kernels.

    >>> qparams = QParams(torch.tensor(0.5), torch.tensor(0, dtype=torch.int32))
    >>> quantize(torch.tensor([-100.0, 0.2, 0.75, 1.25, 100.0]), qparams, QuantSpec())
    tensor([-128,    0,    2,    2,  127], dtype=torch.int8)
    """
    return round_to_grid(x, qparams, spec).to(spec.dtype)


def dequantize(q: torch.Tensor, qparams: QParams) -> torch.Tensor:
    """`s (q - z)`: integers of any shape to float32.

    >>> dequantize(torch.tensor([0, 3], dtype=torch.uint8), QParams(torch.tensor(0.5), torch.tensor(1).int()))
    tensor([-0.5000,  1.0000])
    """
    scale, zero_point = _broadcast(qparams, q)
    return (q.float() - zero_point).mul_(scale)


def fake_quantize(x: torch.Tensor, qparams: QParams, spec: QuantSpec) -> torch.Tensor:
    """`dequantize(quantize(x))` in the dtype of `x` (computed in float32): integers in float.

    Bit-equal to `torch.fake_quantize_per_tensor_affine` and, with `[C]` parameters along dimension 0, to
    `torch.fake_quantize_per_channel_affine`. Of 32 bits it is `x` itself.

    >>> qparams = qparams_from_range(QuantSpec(), -1.0, 127.0)
    >>> fake_quantize(torch.tensor([0.4, 3.6, 500.0]), qparams, QuantSpec())
    tensor([  0.,   4., 127.])
    """
    if spec.is_float:
        return x
    scale, zero_point = _broadcast(qparams, x)
    return round_to_grid(x, qparams, spec).sub_(zero_point).mul_(scale).to(x.dtype)


def round_to_grid(x: torch.Tensor, qparams: QParams, spec: QuantSpec) -> torch.Tensor:
    """`quantize(x)` as integers in float32, in which NaN stays NaN; infinity saturates as any large number does.

    >>> qparams = QParams(torch.tensor(0.5), torch.tensor(0, dtype=torch.int32))
    >>> round_to_grid(torch.tensor([1.25, float("inf"), float("nan")]), qparams, QuantSpec())
    tensor([  2., 127., nan])
    """
    scale, zero_point = _broadcast(qparams, x)
    return (x.float() * scale.reciprocal()).round_().add_(zero_point).clamp_(spec.qmin, spec.qmax)


def _broadcast(qparams: QParams, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point shaped to meet dimension 0 of `x`; the zero point as float32 (exact)."""
    if qparams.multiplier is not None:
        raise OctavoError("qparams: these have groups, which only the rounding of weights knows")
    scale, zero_point = qparams.scale, qparams.zero_point.float()
    if scale.ndim == 0:
        return scale, zero_point
    if x.ndim == 0 or x.shape[0] != scale.shape[0]:
        raise OctavoError(f"qparams: {scale.shape[0]} channels do not meet a tensor of shape {list(x.shape)}")
    shape = [-1] + [1] * (x.ndim - 1)
    return scale.view(shape), zero_point.view(shape)

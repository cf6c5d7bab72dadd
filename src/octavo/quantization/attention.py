"""Attention's two products of matrices on integers, as the integer kernel computes them.

    S[i, j] = c s_q s_k sum_d q[i, d] k[j, d] (+ mask)              c = 1 / sqrt(d), or the scale that the call gives
    E[i, j] = exp(S[i, j] - max_j S[i, j])                          in [0, 1], in float
    O[i, :] = s_e s_v sum_j e[i, j] v[j, :] / sum_j E[i, j]         softmax(S) V, divided last

Small letters are integers, one scale for each tensor, no zero points: the engine takes a product of two activations in
float as soon as one has a zero point. E has the fixed scale 1 / qmax. It is rounded before it is divided by its sum, so
that every row uses the whole grid however many keys share its probability: softmax(S) itself, at 1/255, is no nearer on
64 keys (docs/log.md) and all zeros on 510 even ones.

Kernels of processors without VNNI add two products in saturating int16, so of each pair of operands one has 7 bits: K,
beside Q, which such a kernel shifts to [0, 255] (2 * 255 * 64 < 2^15), and E, beside V (2 * 127 * 128 < 2^15).
Sums are made of integer-valued float32 numbers, exact below 2^24 (`octavo.quantization.quant_layer`). Sources:
Attention (1706.03762) eq. 1; rounding before the division as in SageAttention (2410.02367).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from octavo.errors import OctavoError
from octavo.quantization.affine import round_to_grid
from octavo.quantization.fixed_dtype import FixedDtype
from octavo.quantization.specs import QParams, QuantSpec

EXACT_BITS = 7
"""Of one operand of each product: more would saturate where kernels add pairs of products in int16."""


@dataclass(frozen=True)
class AttentionSpecs:
    """What the four operands become: `query` and `key` of the first product, `exponentials` and `value` of the second.

    Raises `OctavoError` for specs that have no integer kernel.

    >>> AttentionSpecs.of_bits(8).key.qmin, AttentionSpecs.of_bits(8).exponentials.qmax
    (-64, 127)
    """

    query: QuantSpec
    key: QuantSpec
    exponentials: QuantSpec
    value: QuantSpec

    def __post_init__(self) -> None:
        for field in fields(self):
            spec = getattr(self, field.name)
            if spec.granularity != "per_tensor" or spec.symmetric == (field.name == "exponentials"):
                raise OctavoError(
                    f"attention: {field.name} must be per_tensor, and symmetric unless it is exponentials"
                )

    @classmethod
    def of_bits(cls, bits: int) -> AttentionSpecs:
        """All operands of `bits` bits, but K and E of at most 7."""
        fewer = min(bits, EXACT_BITS)
        return cls(QuantSpec(bits), QuantSpec(fewer), QuantSpec(fewer, symmetric=False), QuantSpec(bits))

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; `from_dict` undoes it."""
        return {field.name: getattr(self, field.name).to_dict() for field in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AttentionSpecs:
        """Build from a mapping that has every field, and perhaps others. Raises `KeyError` or `OctavoError`."""
        return cls(**{field.name: QuantSpec.from_dict(values[field.name]) for field in fields(cls)})


class QuantProduct(FixedDtype):
    """`A B` on integers: `[..., n, k]` and `[..., k, m]`, float => `factor s_a s_b sum_k a b`, `[..., n, m]`, float32.

    Buffers `left_scale`, `right_scale`: float32 [], which keep their dtype when the model is cast; uninitialised on
    `device` where no scale is given, for loading into. Zero points are 0.

    >>> product = QuantProduct(QuantSpec(), QuantSpec(7), torch.tensor(0.1), torch.tensor(0.5))
    >>> product(torch.tensor([[0.26, 100.0]]), torch.tensor([[2.0], [-100.0]]))  # 3 * 4 - 127 * 64 integers
    tensor([[-405.8000]])
    """

    left_scale: torch.Tensor
    right_scale: torch.Tensor

    def __init__(
        self,
        left_spec: QuantSpec,
        right_spec: QuantSpec,
        left_scale: torch.Tensor | None = None,
        right_scale: torch.Tensor | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.left_spec, self.right_spec = left_spec, right_spec
        for name, scale in (("left_scale", left_scale), ("right_scale", right_scale)):
            if scale is None:
                scale = torch.empty((), dtype=torch.float32, device=device)
            self.register_buffer(name, scale.to(device, torch.float32, copy=True))

    def forward(self, left: torch.Tensor, right: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        """What the integer kernel computes, rescaled once."""
        integers = _integers(left, self.left_scale, self.left_spec) @ _integers(
            right, self.right_scale, self.right_spec
        )
        return integers * (self.left_scale * self.right_scale * factor)

    def extra_repr(self) -> str:
        return f"{self.left_spec.bits} x {self.right_spec.bits} bits"


class QuantAttention(nn.Module):
    """`torch.nn.functional.scaled_dot_product_attention` with both products on integers; takes its arguments.

    `query [..., n, d]`, `key [..., m, d]`, `value [..., m, c]`, float => `[..., n, c]`, the dtype of `query`.
    `attn_mask`: boolean (True takes part) or float (added), broadcast to `[..., n, m]`; a row that is masked as a whole
    gives zeros, as torch's does. `scales`: of query, key and value, float32 [] each; without them for loading into.
    Raises `OctavoError` for dropout.

    >>> scales = {name: torch.tensor(1 / 32) for name in ("query", "key", "value")}
    >>> attention = QuantAttention(AttentionSpecs.of_bits(8), scales)
    >>> q, k, v = torch.eye(2), torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> attention(q, k, v).round(decimals=2)
    tensor([[0.6700, 0.3300],
            [0.3300, 0.6700]])
    """

    def __init__(
        self, specs: AttentionSpecs, scales: Mapping[str, torch.Tensor] | None = None, device: Any = None
    ) -> None:
        super().__init__()
        given: Mapping[str, torch.Tensor | None] = scales or {}
        of_exponentials = torch.tensor(1 / specs.exponentials.qmax) if scales else None
        self.qk = QuantProduct(specs.query, specs.key, given.get("query"), given.get("key"), device)
        self.pv = QuantProduct(specs.exponentials, specs.value, of_exponentials, given.get("value"), device)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Arguments and result as torch's function."""
        if dropout_p:
            raise OctavoError(f"dropout_p: {dropout_p} cannot be simulated in integers; call eval() first")
        if enable_gqa:  # each key's and value's head serves several of the query's
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
        if is_causal and attn_mask is not None:
            raise OctavoError("is_causal: an attn_mask was given as well; give one of the two")
        if is_causal:
            attn_mask = torch.ones(
                query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device
            ).tril()
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = self.qk(query, key.transpose(-2, -1), factor)
        if attn_mask is not None:
            scores = _masked(scores, attn_mask)
        highest = scores.amax(-1, keepdim=True)
        if attn_mask is not None:  # a row without keys: exp(-inf) = 0 everywhere, not NaN
            highest = highest.clamp(min=torch.finfo(scores.dtype).min)
        exponentials = (scores - highest).exp()
        total = exponentials.sum(-1, keepdim=True)
        if attn_mask is not None:  # at least 1, exp(0), but in a row without keys
            total = total.clamp(min=1)
        return (self.pv(exponentials, value) / total).to(query.dtype)


def _masked(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


def _integers(x: torch.Tensor, scale: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    return round_to_grid(x, QParams(scale, torch.zeros_like(scale, dtype=torch.int32)), spec)

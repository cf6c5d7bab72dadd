"""The request (`QuantSpec`) and the result (`QParams`) of choosing how numbers become integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import torch

from octavo.errors import OctavoError, quoted
from octavo.quantization.packing import BITS

Granularity = Literal["per_tensor", "per_channel", "per_group"]

FLOAT = 32
"""Bits of activations that stay float, where the weights alone are integers."""


@dataclass(frozen=True)
class QuantSpec:
    """How a tensor is to be quantized: number of bits, signedness, and how many scales it gets.

    | symmetric | narrow | integers of b bits            | zero point | dtype |
    |-----------|--------|-------------------------------|------------|-------|
    | True      | False  | [-2^(b-1),     2^(b-1) - 1]   | 0          | int8  |
    | True      | True   | [-(2^(b-1)-1), 2^(b-1) - 1]   | 0          | int8  |
    | False     | False  | [0,            2^b - 1]       | in range   | uint8 |

    32 bits mean that nothing is rounded: activations that stay float (symmetric, per tensor, scale 1, zero point 0).

    `narrow` leaves out the most negative integer, as TensorRT wants it for weights. `per_channel` means one
    scale for each index of dimension 0. `per_group`, of symmetric weights of at most 4 bits: in each of them one
    scale for every `group_size` consecutive values, all of them multiples of the channel's scale
    (`octavo.quantization.groups`). `pair_limit`, of symmetric 8-bit weights per channel: neighbours stay within what
    CPUs without VNNI add exactly (`octavo.quantization.pairs`). Raises `OctavoError` on values outside the table.

    >>> spec = QuantSpec(bits=8, granularity="per_channel", narrow=True)
    >>> spec.qmin, spec.qmax, spec.dtype
    (-127, 127, torch.int8)
    >>> QuantSpec(bits=4, symmetric=False).qmax
    15
    >>> QuantSpec.from_dict(spec.to_dict()) == spec
    True
    """

    bits: int = 8
    symmetric: bool = True
    granularity: Granularity = "per_tensor"
    narrow: bool = False
    group_size: int | None = None
    pair_limit: bool = False

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not (2 <= self.bits <= 8 or self.bits == FLOAT):
            raise OctavoError(f"bits: {quoted(self.bits)} is not an integer from 2 to 8, nor {FLOAT} (float)")
        for name in ("symmetric", "narrow", "pair_limit"):
            if type(getattr(self, name)) is not bool:
                raise OctavoError(f"{name}: {quoted(getattr(self, name))} is neither True nor False")
        if self.granularity not in ("per_tensor", "per_channel", "per_group"):
            raise OctavoError(
                f"granularity: {quoted(self.granularity)} is neither 'per_tensor' nor 'per_channel' nor 'per_group'"
            )
        if self.narrow and not self.symmetric:
            raise OctavoError("narrow: only symmetric integers can leave out their most negative value")
        if self.is_float and (not self.symmetric or self.narrow or self.granularity != "per_tensor"):
            raise OctavoError(
                f"bits: {FLOAT} are for activations that stay float: symmetric, per_tensor, not narrow"
            )
        if self.granularity != "per_group":
            if self.group_size is not None:
                raise OctavoError("group_size: only granularity 'per_group' has groups; leave it out")
        elif type(self.group_size) is not int or self.group_size < 2:
            raise OctavoError(
                f"group_size: {quoted(self.group_size)} is not a whole number from 2 (per_group)"
            )
        elif not self.symmetric or self.bits > BITS:
            raise OctavoError(
                f"granularity: per_group is for symmetric weights of at most {BITS} bits; take per_channel"
            )
        if self.pair_limit and not (self.bits == 8 and self.symmetric and self.granularity == "per_channel"):
            raise OctavoError(
                "pair_limit: only symmetric 8-bit weights per_channel can break it; leave it out"
            )

    @property
    def is_float(self) -> bool:
        """Whether nothing is rounded."""
        return self.bits == FLOAT

    @property
    def qmin(self) -> int:
        """The smallest integer; 0, as the largest, where nothing is rounded."""
        if self.is_float:
            return 0
        if not self.symmetric:
            return 0
        return -(2 ** (self.bits - 1)) + self.narrow

    @property
    def qmax(self) -> int:
        """The largest integer."""
        if self.is_float:
            return 0
        return 2 ** (self.bits - self.symmetric) - 1

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that stores the integers: `torch.int8` when symmetric, else `torch.uint8`; else float32."""
        if self.is_float:
            return torch.float32
        return torch.int8 if self.symmetric else torch.uint8

    def to_dict(self) -> dict[str, Any]:
        """A JSON-safe dict of the fields; `group_size` and `pair_limit` only where given. `from_dict` undoes it."""
        values = asdict(self)
        if self.group_size is None:
            del values["group_size"]  # as before there were groups: digests of older checkpoints stay
        if not self.pair_limit:
            del values["pair_limit"]  # likewise
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantSpec:
        """Build from a dict; absent keys take their default, unknown ones raise `OctavoError`."""
        if not isinstance(values, Mapping):
            raise OctavoError(f"quantization spec: {quoted(values)} is not a mapping")
        known = [field.name for field in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise OctavoError(
                f"quantization spec: unknown key {quoted(unknown[0])} (known: {', '.join(known)})"
            )
        return cls(**values)


@dataclass(frozen=True, eq=False)
class QParams:
    """The mapping `q = clamp(round(x / scale) + zero_point, qmin, qmax)` and `x ~ scale (q - zero_point)`.

    PTQ4DM eq. 1 with the sign of the zero point that the field uses (the paper subtracts it). Rounding is
    half to even. `scale`: float32, `[]` per tensor or `[C]` per channel, above zero; `zero_point`: int32,
    same shape, 0 when symmetric. `multiplier`, per group only: uint8 `[C, groups]`, above zero; the step of group
    g's integers is scale[c] multiplier[c, g]. Raises `OctavoError` when the tensors do not fit together.

    >>> QParams(torch.tensor(0.5), torch.tensor(3, dtype=torch.int32)).scale
    tensor(0.5000)
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    multiplier: torch.Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.scale.dtype != torch.float32 or self.zero_point.dtype != torch.int32:
            raise OctavoError(
                f"qparams: scale must be float32 and zero_point int32, not {self.scale.dtype} and "
                f"{self.zero_point.dtype}"
            )
        if self.scale.shape != self.zero_point.shape or self.scale.ndim > 1:
            raise OctavoError(
                f"qparams: scale {list(self.scale.shape)} and zero_point {list(self.zero_point.shape)} must "
                "both be [] (per tensor) or [C] (per channel)"
            )
        if self.multiplier is not None and (
            self.multiplier.dtype != torch.uint8
            or self.multiplier.ndim != 2
            or self.multiplier.shape[:1] != self.scale.shape
        ):
            raise OctavoError(
                f"qparams: multiplier {self.multiplier.dtype} {list(self.multiplier.shape)} is not uint8 [C, groups]"
            )

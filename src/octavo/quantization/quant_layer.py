"""What layers share that hold integers and simulate the integer kernel.

The kernel reads u8 or s8 activations and s8 weights, adds up int32 and rescales once:

    q = clamp(round(x / s) + z, qmin, qmax)            activations, one s and z per tensor
    y[c] = s s_w[c] sum_k (q[k] - z) w_int8[c, k] + bias[c]   one s_w per output channel

Activations are quantized at the layer's INPUT, where the integer kernel reads them; padding adds real zeros
(q = z). Where groups of columns have scales of their own, w_int8 is m q, a multiple of the few bits that are
stored (`octavo.quantization.groups`), and the kernel sees no difference. A balanced layer multiplies input channel
j by m[j] in front of its quantizer, and its weights hold w / m. A layer with a scale s[g] for each group g of timesteps
multiplies its input by r[g] = s / s[g] too, and its sums by 1 / r[g]: one kernel and its weights serve all groups
(`octavo.quantization.timestep_scales`).
A layer whose activations stay float (32 bits of `QuantSpec`) has integers for weights alone and no integer kernel:
y[c] = s_w[c] sum_k x[k] w_int8[c, k] + bias[c], in float.
Here the sum is made of integer-valued float32 numbers. That is EXACT, equal to the int32 sum, as
long as every partial sum stays below 2^24 in magnitude; beyond, single additions round, and the result
deviates from the int32 one by a relative 2^-24 an addition, in all at most about 4e-6 of sum_k |q - z| |w|
for the sizes of diffusion models (tests/quantization/test_layers.py pins it): a thousandth of one 8-bit step
of a full-scale output. Source of the scheme: PTQ4DM (2211.15736) sections 3.1-3.2; Jacob et al. (1712.05877)
eq. 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from octavo.errors import OctavoError
from octavo.quantization import packing
from octavo.quantization.affine import round_to_grid
from octavo.quantization.balancing import multiplied_input, per_input_channel
from octavo.quantization.fixed_dtype import FixedDtype
from octavo.quantization.groups import check_multipliers, divide, groups_shape, multiply
from octavo.quantization.specs import QParams, QuantSpec
from octavo.quantization.timestep_groups import CurrentGroup


class QuantLayer(FixedDtype):
    """What QuantConv1d to QuantConv3d and QuantLinear share; not for use by itself.

    Buffers: `weight_int8` int8 [C, ...], `weight_scale` float32 [C], `input_scale` float32 [],
    `input_zero_point` int32 [], of weights in groups `group_multiplier` uint8 [C, groups], of a balanced layer
    `input_multiplier` float32 [input channels], and of one with scales by timestep `timestep_factor` float32 [timestep
    groups] (else all None); parameter: `bias` [C] or None, float32 unless the
    module is cast. Attributes: `weight_spec`, `input_spec`, and those of the float layer. In a state dict, and so on
    disk, weights of at most 4 bits are `weight_int4`, two to a byte (`octavo.quantization.packing`), of weights in
    groups not yet multiplied.
    """

    float_class: type[nn.Module]
    shape_names: tuple[str, ...]

    weight_int8: torch.Tensor
    weight_scale: torch.Tensor
    input_scale: torch.Tensor
    input_zero_point: torch.Tensor
    group_multiplier: torch.Tensor | None
    input_multiplier: torch.Tensor | None
    timestep_factor: torch.Tensor | None

    def __init__(
        self,
        layer: nn.Module,
        weight_spec: QuantSpec,
        input_spec: QuantSpec,
        device: Any = "meta",
        balanced: bool = False,
    ) -> None:
        """The quantized layer of `layer`'s shape with uninitialised tensors on `device`, for loading into.

        Raises `TypeError` when `layer` is of another class, `OctavoError` when the specs have no integer kernel.
        """
        super().__init__()
        if type(layer) is not self.float_class:
            raise TypeError(
                f"{type(self).__name__} takes the place of {self.float_class.__name__}, not {layer}"
            )
        if not weight_spec.symmetric or weight_spec.granularity == "per_tensor":
            raise OctavoError(
                "weights: the integer kernels take symmetric per_channel or per_group weights only"
            )
        if input_spec.granularity != "per_tensor":
            raise OctavoError("activations: the integer kernels take per_tensor activations only")
        for name in self.shape_names:
            setattr(self, name, getattr(layer, name))
        self.weight_spec, self.input_spec = weight_spec, input_spec
        shape: torch.Size = layer.weight.shape  # type: ignore[assignment]
        self.register_buffer("weight_int8", torch.empty(shape, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.empty(shape[0], dtype=torch.float32, device=device))
        self.register_buffer("input_scale", torch.empty((), dtype=torch.float32, device=device))
        self.register_buffer("input_zero_point", torch.empty((), dtype=torch.int32, device=device))
        size, of_groups = weight_spec.group_size, None
        if size is not None:
            of_groups = torch.empty(groups_shape(shape, size), dtype=torch.uint8, device=device)
        self.register_buffer("group_multiplier", of_groups)
        if balanced and getattr(layer, "groups", 1) > 1:
            raise OctavoError("input_multiplier: a convolution with groups is not balanced")
        multiplier = torch.empty(shape[1], dtype=torch.float32, device=device) if balanced else None
        self.register_buffer("input_multiplier", multiplier)
        self.register_buffer("timestep_factor", None)  # given by `attach_timestep_groups`
        self.current_group: CurrentGroup | None = None
        self.bias: nn.Parameter | None = None
        if layer.bias is not None:
            bias = torch.empty(shape[0], dtype=torch.float32, device=device)
            self.bias = nn.Parameter(bias, requires_grad=False)

    @classmethod
    def from_float(
        cls,
        layer: nn.Module,
        weight_spec: QuantSpec,
        input_spec: QuantSpec,
        weight_int8: torch.Tensor,
        weight_qparams: QParams,
        input_qparams: QParams,
        input_multiplier: torch.Tensor | None = None,
    ) -> Any:
        """The quantized layer in place of `layer`, which is not changed; its bias is copied, its mode kept.

        `weight_int8`: int8, the shape of `layer.weight`; `weight_qparams`: [C], both as `round_nearest` gives them;
        `input_qparams`: []; `input_multiplier`: [input channels] of a balanced layer, whose integers and scales are
        those of w / m and x m. Raises as the class itself does, and `OctavoError` when a tensor does not fit.
        """
        new = cls(layer, weight_spec, input_spec, balanced=input_multiplier is not None)
        if weight_int8.dtype != torch.int8 or weight_int8.shape != new.weight_int8.shape:
            raise OctavoError(
                f"weight_int8: {weight_int8.dtype} {list(weight_int8.shape)} is not int8 "
                f"{list(new.weight_int8.shape)}"
            )
        multiplier = weight_qparams.multiplier
        check_multipliers("weight_qparams", multiplier, weight_int8.shape, weight_spec)
        integers = divide(weight_int8, multiplier, weight_spec)
        if int(integers.min()) < weight_spec.qmin or int(integers.max()) > weight_spec.qmax:
            raise OctavoError(f"weight_int8: values outside [{weight_spec.qmin}, {weight_spec.qmax}]")
        if not torch.equal(multiply(integers, multiplier, weight_spec), weight_int8):
            raise OctavoError("weight_int8: values that are no multiples of their group's multiplier")
        if multiplier is not None:
            new.group_multiplier = multiplier.to(weight_int8.device, copy=True)
        if weight_qparams.scale.shape != new.weight_scale.shape or bool(
            (weight_qparams.zero_point != 0).any()
        ):
            raise OctavoError("weight_qparams: give one scale per output channel and zero points of 0")
        if input_qparams.scale.ndim:
            raise OctavoError("input_qparams: give one scale for the whole tensor")
        if input_multiplier is not None:
            assert new.input_multiplier is not None
            if input_multiplier.shape != new.input_multiplier.shape or not bool((input_multiplier > 0).all()):
                raise OctavoError("input_multiplier: give one positive number per input channel")
            new.input_multiplier = input_multiplier.to(weight_int8.device, torch.float32, copy=True)
        new.weight_int8 = weight_int8.detach().clone(memory_format=torch.contiguous_format)
        new.weight_scale = weight_qparams.scale.to(weight_int8.device, copy=True)
        new.input_scale = input_qparams.scale.to(weight_int8.device, copy=True)
        new.input_zero_point = input_qparams.zero_point.to(weight_int8.device, copy=True)
        if isinstance(layer.bias, torch.Tensor):
            bias = layer.bias.detach().to(weight_int8.device, torch.float32, copy=True)
            new.bias = nn.Parameter(bias, requires_grad=False)
        return new.train(layer.training)

    def __dir__(self) -> list[str]:
        """All names but those whose reading computes a whole weight: torch's tracer reads whatever is named here."""
        return [name for name in super().__dir__() if name not in ("weight", "weight_int4")]

    @property
    def weight_int4(self) -> torch.Tensor:
        """The stored integers two to a byte, computed when read; of weights of at most 4 bits only."""
        if not self.is_packed:
            raise AttributeError(f"weight_int4: these weights have {self.weight_spec.bits} bits")
        return packing.pack(divide(self.weight_int8, self.group_multiplier, self.weight_spec))

    @property
    def is_packed(self) -> bool:
        """Whether a state dict holds `weight_int4` in place of `weight_int8`."""
        return self.weight_spec.bits <= packing.BITS

    def multiply_groups(self) -> None:
        """Turn the stored integers in `weight_int8` into those that execute; once, after they were read."""
        self.weight_int8 = multiply(self.weight_int8, self.group_multiplier, self.weight_spec)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_packed:
            destination[f"{prefix}weight_int4"] = self.weight_int4
            del destination[f"{prefix}weight_int8"]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        packed = state_dict.pop(f"{prefix}weight_int4", None) if self.is_packed else None
        if packed is not None:
            integers = packing.unpack(packed, self.weight_int8.shape)
            multiplier = state_dict.get(f"{prefix}group_multiplier")
            state_dict[f"{prefix}weight_int8"] = multiply(integers, multiplier, self.weight_spec)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized weight `s_w[c] w_int8[c, j] m[j]`, float32, computed when read; m = 1 if not balanced."""
        weight = self.stored_weight()
        if self.input_multiplier is None:
            return weight
        return weight * per_input_channel(self.input_multiplier, weight.ndim)

    def stored_weight(self) -> torch.Tensor:
        """`s_w[c] w_int8[c, j]`, float32: the weight that meets what `quantizer_input` gives."""
        return self.weight_int8.float() * self._per_channel(self.weight_scale, self.weight_int8.ndim)

    def weight_row(self, channel: int) -> torch.Tensor:
        """`weight[channel]`, without the others."""
        row = self.weight_int8[channel].float() * self.weight_scale[channel]
        if self.input_multiplier is None:
            return row
        return row * self._per_channel(self.input_multiplier, row.ndim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the integer kernel computes from `x`, in float32, returned in the dtype of `x`."""
        dtype = x.dtype
        x = self.quantizer_input(x)
        channel_dims = self.weight_int8.ndim - 1 if self.weight_int8.ndim > 2 else 1
        if self.input_spec.is_float:
            y = self.accumulate(x.float(), self.stored_weight())
        else:
            qparams = QParams(self.input_scale, self.input_zero_point)
            q = round_to_grid(x, qparams, self.input_spec) - self.input_zero_point
            y = self.accumulate(q, self.weight_int8.float())
            y = y * self._per_channel(self.input_scale * self.weight_scale, channel_dims)
        y = self.rescaled(y)
        if self.bias is not None:
            y = y + self._per_channel(self.bias.float(), channel_dims)
        return y.to(dtype)

    def balanced_input(self, x: torch.Tensor) -> torch.Tensor:
        """What the weights are multiplied with, not yet rounded: `x` itself, or float32 x m[j] if it is balanced."""
        if self.input_multiplier is None:
            return x
        return multiplied_input(x, self.input_multiplier, self.weight_int8.ndim)

    def quantizer_input(self, x: torch.Tensor) -> torch.Tensor:
        """What the quantizer reads: `balanced_input`, times r[g] if the layer's scale depends on the timestep.

        Raises `OctavoError` for such a layer when it is called outside of its network.
        """
        if self.timestep_factor is None:
            return self.balanced_input(x)
        factor = self._of_rows(self.timestep_factor, x.ndim)
        if self.input_multiplier is not None:  # one multiplication of x, the other of a few numbers
            factor = factor * per_input_channel(self.input_multiplier, self.weight_int8.ndim)
        return x.float() * factor

    def rescaled(self, y: torch.Tensor) -> torch.Tensor:
        """`y`, or y / r[g] if the layer's scale depends on the timestep: undoes `quantizer_input`'s factor in sums."""
        if self.timestep_factor is None:
            return y
        return y * self._of_rows(self.timestep_factor.reciprocal(), y.ndim)

    def _of_rows(self, table: torch.Tensor, ndim: int) -> torch.Tensor:
        return (self.current_group or CurrentGroup()).of_rows(table, ndim)

    def accumulate(self, q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Integer-valued float32 activations and weights to their integer-valued sums."""
        raise NotImplementedError

    @staticmethod
    def _per_channel(values: torch.Tensor, ndim: int) -> torch.Tensor:
        return values.view(-1, *[1] * (ndim - 1))

    def extra_repr(self) -> str:
        shape = ", ".join(f"{name}={getattr(self, name)}" for name in self.shape_names)
        balanced = ", balanced" if self.input_multiplier is not None else ""
        size = self.weight_spec.group_size
        groups = f", group_size={size}" if size is not None else ""
        bits = f"w{self.weight_spec.bits}a{'float' if self.input_spec.is_float else self.input_spec.bits}"
        factor = self.timestep_factor
        timesteps = f", timestep_groups={len(factor)}" if factor is not None else ""
        return f"{shape}, bias={self.bias is not None}, {bits}{groups}{balanced}{timesteps}"

"""A quantized layer on a GPU: its integers packed once as the kernels read them, activations rounded, products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from octavo.errors import OctavoError
from octavo.quantization import QuantLayer
from octavo.quantization.fixed_dtype import FixedDtype
from octavo.runtimes.cuda import launch
from octavo.runtimes.cuda.operations import int8_convolution, int8_matmul

NO_BORDER = (0, 0, 0)


class IntegerLayer(FixedDtype):
    """What a `QuantLayer` computes, by Triton's kernels on int8: the same arguments, shapes and dtypes.

    The activation is rounded by one kernel (where torch.compile traces, by what it makes of torch's operations) and
    multiplied by another, which also rescales and adds the bias. Buffers,
    on the device of `layer`, whose dtypes casts leave alone: `weight` int8 `[C, K]`, or of a convolution
    `[C, D, H, W, K]` (channels last; a linear layer's shares the memory of `layer`), `offset` int32 [C] or None,
    `scale` float32 [C] = s s_w, `bias` float32 [C] or None, `multiplier` float32 [K] or None, and of a layer with
    scales by timestep `factor` and `reciprocal` float32 [timestep groups]. Convolutions answer in channels last.

    `answer`: the dtype of what it gives, else that of what it reads. `name` is for errors and the audit. Raises
    `OctavoError` for sums too long for int32.
    """

    weight: torch.Tensor
    offset: torch.Tensor | None
    scale: torch.Tensor
    bias: torch.Tensor | None
    multiplier: torch.Tensor | None
    factor: torch.Tensor | None
    reciprocal: torch.Tensor | None

    def __init__(self, layer: QuantLayer, name: str) -> None:
        super().__init__()
        integers, spec = layer.weight_int8, layer.input_spec
        if integers[0].numel() > launch.MOST_DEPTH:
            raise OctavoError(
                f"{name}: adds {integers[0].numel()} products, too many for int32 sums on torch-cuda (at most "
                f"{launch.MOST_DEPTH}); exclude it when quantizing"
            )
        moved = 0 if spec.symmetric else launch.MOVED
        self.zero_point = int(layer.input_zero_point) - moved
        self.low, self.high = spec.qmin - moved, spec.qmax - moved
        self.reciprocal_scale = float(layer.input_scale.reciprocal())
        offset = -self.zero_point * integers.flatten(1).sum(1, dtype=torch.int32) if self.zero_point else None
        self.register_buffer("offset", offset)
        self.register_buffer("scale", layer.input_scale * layer.weight_scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())
        self.register_buffer("multiplier", layer.input_multiplier)
        self.register_buffer("factor", layer.timestep_factor)
        self.register_buffer(
            "reciprocal", None if layer.timestep_factor is None else layer.timestep_factor.reciprocal()
        )
        self.current_group = layer.current_group
        self.name = name
        self.answer: torch.dtype | None = None
        self.geometry = _Geometry(layer) if integers.ndim > 2 else None
        if self.geometry is not None:
            integers = integers.movedim(1, -1)
            integers = integers.reshape(len(integers), *[1] * (5 - integers.ndim), *integers.shape[1:])
            if self.geometry.one_position:
                integers = integers.flatten(1)
        self.register_buffer("weight", integers.contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Linear `[..., K]` => `[..., C]`; convolution `[N, K, (D, H,) W]` => `[N, C, (D', H',) W']`."""
        if self.geometry is None:
            return self._product(x.reshape(x.shape[0] if x.ndim > 1 else 1, -1, x.shape[-1])).view(
                *x.shape[:-1], len(self.weight)
            )
        x = self.geometry.padded(x)
        if self.geometry.one_position:
            y = self._product(x.flatten(2).transpose(1, 2))
            return y.transpose(1, 2).unflatten(2, x.shape[2:])
        ahead = 5 - x.ndim
        y = int8_convolution(
            self._integers(x.movedim(1, -1)[(slice(None), *[None] * ahead)]),
            self.weight,
            self.offset,
            self.scale,
            self.bias,
            self._by_image(self.reciprocal, len(x)),
            self.answer or x.dtype,
            self.geometry.stride,
            self.geometry.dilation,
            self.geometry.groups,
            self.name,
        )
        return y.movedim(-1, 1).flatten(2, 2 + ahead)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        """`[images, positions, K]` => `[images, positions, C]`."""
        reciprocal, dtype = self._by_image(self.reciprocal, len(x)), self.answer or x.dtype
        q = self._integers(x[:, None, None])[:, 0, 0]
        return int8_matmul(q, self.weight, self.offset, self.scale, self.bias, reciprocal, dtype, self.name)

    def _integers(self, x: torch.Tensor) -> torch.Tensor:
        """Float `[images, D, H, W, K]` => int8, with the border that the convolution reads.

        By the kernel; where torch.compile traces, by torch's operations, which it fuses with what gave `x`.
        """
        factor = self._by_image(self.factor, len(x))
        before, after = self.geometry.borders if self.geometry is not None else (NO_BORDER, NO_BORDER)
        ends = self.zero_point, self.low, self.high
        if not torch.compiler.is_compiling():
            return launch.quantize(x, self.reciprocal_scale, *ends, self.multiplier, factor, before, after)
        value = x.float()
        if factor is not None:
            by_image = factor[:, None, None, None, None]
            value = value * (by_image if self.multiplier is None else by_image * self.multiplier)
        elif self.multiplier is not None:
            value = value * self.multiplier
        value = value * self.reciprocal_scale
        value = value.clamp(self.low - self.zero_point, self.high - self.zero_point).round() + self.zero_point
        around = [side for pair in zip(before[::-1], after[::-1], strict=True) for side in pair]
        return F.pad(value.to(torch.int8), (0, 0, *around), value=self.zero_point).contiguous()

    def _by_image(self, table: torch.Tensor | None, images: int) -> torch.Tensor | None:
        """float32 [images]: the entries of a table of the timesteps' groups; None for none."""
        if table is None:
            return None
        assert self.current_group is not None
        return self.current_group.of_rows(table, 1).expand(images).contiguous()

    def extra_repr(self) -> str:
        return f"{list(self.weight.shape)}, bias={self.bias is not None}"


class _Geometry:
    """A convolution's numbers for three dimensions, D, H, W, of which the first ones may be trivial."""

    def __init__(self, layer: Any) -> None:
        kernel, dims = layer.kernel_size, len(layer.kernel_size)
        self.mode: str = layer.padding_mode
        self.around: Sequence[int] = layer._reversed_padding_repeated_twice
        if layer.padding == "same":
            before = [d * (k - 1) // 2 for d, k in zip(layer.dilation, kernel, strict=True)]
            after = [d * (k - 1) - b for d, k, b in zip(layer.dilation, kernel, before, strict=True)]
        else:
            before = after = [0] * dims if layer.padding == "valid" else list(layer.padding)
        if self.mode != "zeros":
            before = after = [0] * dims
        self.kernel, self.stride = self._three(kernel, 1), self._three(layer.stride, 1)
        self.dilation, self.groups = self._three(layer.dilation, 1), int(layer.groups)
        self.padding, self.after = self._three(before, 0), self._three(after, 0)
        self.one_position = (
            self.groups == 1 and {*self.kernel, *self.stride} == {1} and not any((*self.padding, *self.after))
        )

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """`x` with what is not zeros around it already."""
        return x if self.mode == "zeros" else F.pad(x, self.around, mode=self.mode)

    @property
    def borders(self) -> tuple[Sequence[int], Sequence[int]]:
        """Positions of zeros in front of D, H, W and behind."""
        return self.padding, self.after

    @staticmethod
    def _three(numbers: Sequence[int], filling: int) -> list[int]:
        return [*[filling] * (3 - len(numbers)), *numbers]

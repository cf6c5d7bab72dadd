"""A quantized layer on a GPU: its integers packed once as the kernels read them, and two launches for each call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from octavo.errors import OctavoError
from octavo.quantization import QuantLayer
from octavo.quantization.fixed_dtype import FixedDtype
from octavo.runtimes.cuda import launch


class IntegerLayer(FixedDtype):
    """What a `QuantLayer` computes, by Triton's kernels on int8: the same arguments, shapes and dtypes.

    The activation is rounded by one kernel and multiplied by another, which also rescales and adds the bias. Buffers,
    on the device of `layer`, whose dtypes casts leave alone: `weight` int8 `[C, K]`, or of a convolution
    `[C, D, H, W, K]` (channels last; a linear layer's shares the memory of `layer`), `offset` int32 [C] or None,
    `scale` float32 [C] = s s_w, `bias` float32 [C] or None, `multiplier` float32 [K] or None, and of a layer with
    scales by timestep `factor` and `reciprocal` float32 [timestep groups]. Convolutions answer in channels last.

    `answer`: the dtype of what it gives, else that of what it reads. `name` is for errors. Raises `OctavoError` for
    sums too long for int32.
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
            columns = x.reshape(x.shape[0] if x.ndim > 1 else 1, -1, x.shape[-1])
            return self._product(columns).view(*x.shape[:-1], len(self.weight))
        x = self.geometry.padded(x)
        columns = x.flatten(2).transpose(1, 2)
        if self.geometry.one_position:
            y = self._product(columns)
            return y.transpose(1, 2).unflatten(2, x.shape[2:])
        size = [*[1] * (5 - x.ndim), *x.shape[2:]]
        y = launch.convolution(
            self._integers(columns).unflatten(1, size),
            self.weight,
            self.offset,
            self.scale,
            self.bias,
            self._by_image(self.reciprocal, len(x)),
            self.answer or x.dtype,
            self.zero_point,
            self.geometry.out_size(size),
            self.geometry.stride,
            self.geometry.padding,
            self.geometry.dilation,
            self.geometry.groups,
        )
        return y.movedim(-1, 1).flatten(2, 7 - x.ndim)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        reciprocal, dtype = self._by_image(self.reciprocal, len(x)), self.answer or x.dtype
        return launch.matmul(
            self._integers(x), self.weight, self.offset, self.scale, self.bias, reciprocal, dtype
        )

    def _integers(self, x: torch.Tensor) -> torch.Tensor:
        factor = self._by_image(self.factor, len(x))
        return launch.quantize(
            x, self.reciprocal_scale, self.zero_point, self.low, self.high, self.multiplier, factor
        )

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

    def out_size(self, size: Sequence[int]) -> list[int]:
        """Output positions of an input of `size`, each D, H, W."""
        return [
            (n + before + after - d * (k - 1) - 1) // s + 1
            for n, before, after, d, k, s in zip(
                size, self.padding, self.after, self.dilation, self.kernel, self.stride, strict=True
            )
        ]

    @staticmethod
    def _three(numbers: Sequence[int], filling: int) -> list[int]:
        return [*[filling] * (3 - len(numbers)), *numbers]

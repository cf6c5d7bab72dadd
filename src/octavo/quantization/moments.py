"""Second moments of what a layer's weights are multiplied with: what second-order rounding needs to know."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from octavo.quantization.affine import fake_quantize
from octavo.quantization.layers import QuantLinear
from octavo.quantization.quant_layer import QuantLayer
from octavo.quantization.specs import QParams

LEAST_ROWS = 16384
ROWS_PER_COLUMN = 4
MOST_COLUMNS = 6144
"""151 MB a moment; what rounds by it works in float64, on two such matrices at a time."""


class SecondMoment:
    """E[x x^T] of the rows x that one quantized layer multiplies with its weight, in float32 `[parts, k, k]`.

    A linear layer's rows are its inputs; a convolution's are the patches under its kernel (K = in_channels / groups
    * kernel size), padding included. They are taken after the layer's own quantizer: what the integer kernel reads, by
    whatever scale it has at the timestep of the call.
    Memory: parts * k^2 floats, whatever is observed.

    `parts`: a convolution's groups. Of a layer without groups whose K is above `most_columns`, only the diagonal
    blocks are kept (`is_approximate`): K is cut into the fewest equal parts that are short enough.

    `wanted`: how many rows are enough; of a batch that offers more than its share, that share is drawn with the
    generator given, so that the cost does not grow with the image size.

    >>> from torch import nn
    >>> from octavo.quantization.specs import QuantSpec
    >>> layer = QuantLinear(nn.Linear(3, 2), QuantSpec(8, True, "per_channel"), QuantSpec(8), "cpu")
    >>> layer.input_scale.fill_(1.0), layer.input_zero_point.zero_()
    (tensor(1.), tensor(0, dtype=torch.int32))
    >>> moment = SecondMoment(layer, batches=1)
    >>> moment.observe(torch.tensor([[1.0, 0.0, 2.2]]))
    >>> moment.value()[0]
    tensor([[1., 0., 2.],
            [0., 0., 0.],
            [2., 0., 4.]])
    """

    def __init__(
        self,
        layer: QuantLayer,
        batches: int,
        seed: int = 0,
        wanted: int | None = None,
        most_columns: int = MOST_COLUMNS,
    ) -> None:
        self.layer = layer
        columns = layer.weight_int8[0].numel()
        self.parts, width = moment_shape(layer.weight_int8, getattr(layer, "groups", 1), most_columns)
        self.is_approximate = self.parts * width == columns and self.parts > 1
        wanted = max(LEAST_ROWS, ROWS_PER_COLUMN * columns) if wanted is None else wanted
        self.share = -(-wanted // batches)
        self.generator = torch.Generator().manual_seed(seed)
        self.sum = torch.zeros(self.parts, width, width)
        self.rows = 0

    def observe(self, x: torch.Tensor) -> None:
        """Add the rows of one input of the layer, as its `forward` is handed it."""
        qparams = QParams(self.layer.input_scale, self.layer.input_zero_point)
        x = fake_quantize(self.layer.quantizer_input(x).float(), qparams, self.layer.input_spec)
        x = self.layer.rescaled(x)
        rows = self._linear_rows(x) if isinstance(self.layer, QuantLinear) else self._patches(x)
        if rows.device == self.sum.device:  # in place: a product of its own would be as large as the sum
            self.sum.baddbmm_(rows.transpose(1, 2), rows)
        else:
            self.sum += (rows.transpose(1, 2) @ rows).cpu()
        self.rows += rows.shape[1]

    def value(self) -> torch.Tensor:
        """The mean over all rows observed, computed in place: nothing is observed after it."""
        self.sum /= max(1, self.rows)
        self.rows = 1
        return self.sum

    def _drawn(self, offered: int) -> torch.Tensor:
        if offered <= self.share:
            return torch.arange(offered)
        return torch.randperm(offered, generator=self.generator)[: self.share].sort().values

    def _linear_rows(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` => `[parts, rows, k]`."""
        x = x.reshape(-1, x.shape[-1])
        x = x[self._drawn(len(x)).to(x.device)]
        return x.view(len(x), self.parts, -1).transpose(0, 1)

    def _patches(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, C, (D,) (H,) W]` => `[parts, rows, k]`: patches at drawn places, and no others, in memory."""
        layer = self.layer
        if x.ndim == 3:
            x = x[:, :, None]
        if x.ndim == 5:
            x = _planes(layer, x)
        kernel, stride, dilation = (
            _pair(getattr(layer, name)) for name in ("kernel_size", "stride", "dilation")
        )
        x = F.pad(x, _padding(layer, kernel, dilation), mode=_mode(layer))
        reach = [step * (size - 1) + 1 for size, step in zip(kernel, dilation, strict=True)]
        places = [
            (side - extent) // jump + 1 for side, extent, jump in zip(x.shape[2:], reach, stride, strict=True)
        ]
        per_image = places[0] * places[1]
        drawn = self._drawn(len(x) * per_image).to(x.device)
        rows = []
        for i, image in enumerate(x):
            mine = drawn[(drawn >= i * per_image) & (drawn < (i + 1) * per_image)] - i * per_image
            if len(mine):
                seen = image.unfold(1, reach[0], stride[0]).unfold(2, reach[1], stride[1])
                seen = seen[
                    ..., :: dilation[0], :: dilation[1]
                ]  # [C, places, places, kernel, kernel], a view
                patches = seen[:, mine // places[1], mine % places[1]]
                rows.append(patches.permute(0, 2, 3, 1).reshape(self.parts, -1, len(mine)))
        return (rows[0] if len(rows) == 1 else torch.cat(rows, dim=2)).transpose(1, 2)


def moment_shape(weight: torch.Tensor, groups: int = 1, most_columns: int = MOST_COLUMNS) -> tuple[int, int]:
    """Parts, and columns of a part, of the `SecondMoment` of a layer with this weight `[out, ...]`, of any dtype.

    >>> moment_shape(torch.zeros(2, 12), most_columns=5)
    (3, 4)
    """
    columns = weight[0].numel()
    if groups > 1:
        return groups, columns
    parts = next(n for n in range(1, columns + 1) if columns % n == 0 and columns // n <= most_columns)
    return parts, columns // parts


def moment_bytes(weight: torch.Tensor, groups: int = 1) -> int:
    """What that moment takes.

    >>> moment_bytes(torch.zeros(2, 12))
    576
    """
    parts, columns = moment_shape(weight, groups)
    return 4 * parts * columns**2


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    """A one-dimensional convolution is a two-dimensional one of height 1; of a three-dimensional one the last two."""
    return (1, value[0]) if len(value) == 1 else (value[-2], value[-1])


def _planes(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """`[N, C, D, H, W]` => `[N D', C K, H, W]`: the K planes that each plane of the output reads, as channels."""
    size, jump, step = layer.kernel_size[0], layer.stride[0], layer.dilation[0]
    reach = step * (size - 1)
    before, behind = {"valid": (0, 0), "same": (reach // 2, reach - reach // 2)}.get(
        str(layer.padding), (layer.padding[0], layer.padding[0])
    )
    x = F.pad(x, [0, 0, 0, 0, before, behind], mode=_mode(layer))
    read = [x[:, :, k : k + reach + 1 : step] for k in range(0, x.shape[2] - reach, jump)]
    return torch.stack(read, dim=1).flatten(2, 3).flatten(0, 1)


def _padding(layer: QuantLayer, kernel: tuple[int, int], dilation: tuple[int, int]) -> list[int]:
    """As `F.pad` takes it: left, right, top, bottom."""
    given: Any = layer.padding
    if given == "valid":
        return [0, 0, 0, 0]
    if given == "same":
        total = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
        return [total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2]
    vertical, horizontal = (0, given[0]) if len(given) == 1 else given[-2:]
    return [horizontal, horizontal, vertical, vertical]


def _mode(layer: QuantLayer) -> str:
    mode = str(getattr(layer, "padding_mode", "zeros"))
    return "constant" if mode == "zeros" else mode

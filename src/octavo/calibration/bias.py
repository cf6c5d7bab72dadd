"""Bias correction: what quantization adds to a layer's outputs on average, taken out of the layer's bias."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from octavo.calibration.collect import PairStore
from octavo.calibration.evaluate import evaluate_rows, rows_at_once
from octavo.calibration.tracing import evaluating, hooked
from octavo.errors import OctavoError
from octavo.quantization import QuantLayer, QuantLinear, SubPixelUpsample2D, quantized_layers
from octavo.quantization.sub_pixel import PLACES


@dataclass(frozen=True)
class Corrected:
    """What was taken out of one layer's bias.

    `shift`: root mean square over output channels, in the layer's output units. `outputs`: the same of the float
    layer's mean outputs, to compare with.
    """

    layer: str
    shift: float
    outputs: float


class _ChannelMean:
    """The mean of each output channel over rows, positions and calls, float64 `[C]`; sums of one call are float32."""

    def __init__(self) -> None:
        self.sum: torch.Tensor | float = 0.0
        self.count: torch.Tensor | float = 0.0

    def add(self, y: torch.Tensor, output: _Output) -> None:
        parts, dim = output.parts(y), output.channel_dim % y.ndim
        sums = [part.float().sum([d for d in range(y.ndim) if d != dim]) for part in parts]
        self.sum = self.sum + torch.cat(sums).cpu().double()
        channels = y.shape[dim]
        counts = [torch.full((channels,), part.numel() / channels, dtype=torch.float64) for part in parts]
        self.count = self.count + torch.cat(counts)

    def value(self) -> torch.Tensor:
        assert isinstance(self.sum, torch.Tensor)
        return self.sum / self.count


@dataclass(frozen=True)
class _Output:
    """What a layer's channels are in what `module` gives: of a sub-pixel convolution every second row and column."""

    module: nn.Module
    channel_dim: int
    is_sub_pixel: bool

    @classmethod
    def of(cls, network: nn.Module, name: str) -> _Output:
        parent = network.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, SubPixelUpsample2D):
            return cls(parent, 1, True)
        layer = network.get_submodule(name)
        return cls(layer, -1 if isinstance(layer, (nn.Linear, QuantLinear)) else 1, False)

    def parts(self, y: torch.Tensor) -> list[torch.Tensor]:
        """The output of each place's channels, in the layer's order."""
        return [y[:, :, a::2, b::2] for _, a, b in PLACES] if self.is_sub_pixel else [y]

    def lowered(self, y: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
        """`y` less the error of each of the layer's channels."""
        error = error.to(y.device, y.dtype)
        if not self.is_sub_pixel:
            return y - error.view(-1, *[1] * (y.ndim - 1 - self.channel_dim % y.ndim))
        height, width = y.shape[2:]
        blocks = error.view(2, 2, -1).permute(2, 0, 1).repeat(1, -(-height // 2), -(-width // 2))
        return y - blocks[:, :height, :width]


def correct_biases(
    quantized: nn.Module,
    original: nn.Module,
    pairs: PairStore,
    order: Sequence[str],
    *,
    passes: int = 1,
    progress: bool = True,
) -> list[Corrected]:
    """Take each layer's mean output error on the calibration pairs out of its bias; `quantized` is changed in place.

        b[c] <- b[c] - E[(Q x')[c] - (W x)[c]]      float32 `[C]`, E over pairs and positions

    Q x': the quantized layer's output in the quantized network, whose input x' carries the errors of the layers
    before it; W x: the float layer's output in `original`, on the same pair. Source: Nagel et al. (1906.04721),
    section 4.2, empirical bias correction.

    `order`: layer names in order of execution. There a layer is to be corrected once those before it are: one that
    also took out what they will take out themselves would overshoot, and so would each after it (docs/log.md). That
    costs a pass over the pairs for every layer. Here a pass corrects many: both networks are evaluated on the same
    rows, and each layer's output is lowered, as it runs, by its mean error over the rows so far, so that the layers
    after it read corrected inputs. Their first rows are corrected by a rough mean; with one pass about a quarter of
    the mean error (root mean square) stays. `passes`: the layers are cut into as many groups, in order; as many as
    there are layers is exact.

    Layers without a bias are left alone, and no layer gets one: shapes, names and the graph stay. Memory: a mean for
    each layer, twice. A pass costs an evaluation of both networks on every pair and keeps nothing on disk: a killed
    one is made again, to the same bits. Raises `OctavoError` if `passes` is below 1.
    """
    if passes < 1:
        raise OctavoError(f"passes: {passes} is not a whole number from 1")
    layers = dict(quantized_layers(quantized))
    names = [name for name in order if name in layers and layers[name].bias is not None]
    size = max(1, -(-len(names) // passes))
    groups = [names[first : first + size] for first in range(0, len(names), size)]
    done: list[Corrected] = []
    with (
        tqdm(
            total=len(groups) * len(pairs), desc="correct biases", unit="batch", disable=not progress
        ) as bar,
        torch.inference_mode(),
        evaluating(quantized),
        evaluating(original),
    ):
        for group in groups:
            of_float, of_quantized = ({name: _ChannelMean() for name in group} for _ in range(2))
            with _observed(original, of_float), _corrected(quantized, of_quantized, of_float):
                for batch in pairs:
                    for rows in rows_at_once(batch):
                        # in turn: the means so far must be of the same rows
                        evaluate_rows(original, rows)
                        evaluate_rows(quantized, rows)
                    bar.update(1)
            done += [_shifted(name, layers[name], of_quantized[name], of_float[name]) for name in group]
    return done


def summary(rows: Sequence[Corrected]) -> dict[str, Any]:
    """JSON-safe: how many layers, and the median of shift / outputs."""
    ratios = [row.shift / row.outputs for row in rows if row.outputs > 0]
    return {
        "layers": len(rows),
        "median_shift_over_mean_output": round(statistics.median(ratios), 6) if ratios else None,
    }


@contextmanager
def _observed(original: nn.Module, means: Mapping[str, _ChannelMean]) -> Iterator[None]:
    def hook_of(output: _Output, mean: _ChannelMean) -> Any:
        return lambda module, args, y: mean.add(y, output)

    outputs = {name: _Output.of(original, name) for name in means}
    hooks = [
        output.module.register_forward_hook(hook_of(output, means[name])) for name, output in outputs.items()
    ]
    with hooked(hooks):
        yield


@contextmanager
def _corrected(
    quantized: nn.Module,
    means: Mapping[str, _ChannelMean],
    of_float: Mapping[str, _ChannelMean],
) -> Iterator[None]:
    """Within the block each layer's output is lowered by its mean error so far; `means` are of outputs as they were."""

    def hook_of(name: str, output: _Output) -> Any:
        def hook(module: nn.Module, args: Any, y: torch.Tensor) -> torch.Tensor:
            means[name].add(y, output)
            return output.lowered(y, means[name].value() - of_float[name].value())

        return hook

    outputs = {name: _Output.of(quantized, name) for name in means}
    hooks = [output.module.register_forward_hook(hook_of(name, output)) for name, output in outputs.items()]
    with hooked(hooks):
        yield


def _shifted(name: str, layer: QuantLayer, mean: _ChannelMean, of_float: _ChannelMean) -> Corrected:
    assert layer.bias is not None
    if isinstance(of_float.sum, float):  # of a layer that these pairs do not reach
        return Corrected(name, 0.0, 0.0)
    wanted = of_float.value()
    error = mean.value() - wanted
    layer.bias.copy_((layer.bias.double().cpu() - error).to(layer.bias.dtype))
    return Corrected(name, float(error.square().mean().sqrt()), float(wanted.square().mean().sqrt()))

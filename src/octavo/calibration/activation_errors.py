"""What rounding one layer's activations does to the network's output, and what bf16 does, on a few pairs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from octavo.calibration.collect import PairStore
from octavo.calibration.evaluate import rows_at_once
from octavo.calibration.observations import Observations
from octavo.calibration.rules import LayerRule
from octavo.calibration.tracing import evaluating
from octavo.diffusion import CalibrationPair, call_arguments, collate, first_output
from octavo.errors import OctavoError
from octavo.files import read_json, write_json
from octavo.quantization import QParams, QuantSpec, fake_quantize, walk
from octavo.quantization.balancing import multiplied_input, per_input_channel

MOST_PAIRS, LEAST_PAIRS, PASSES = 32, 2, 4
"""Pairs that each layer is measured on, at most and at least, where all layers together may take so many passes."""
BF16 = "bf16"


@dataclass(frozen=True)
class Errors:
    """What was measured on R rows, and what a layer costs.

    layers   float64 [R] by layer: ||y_l - y||^2, with y the network's output on a row and y_l that where layer l alone
             reads rounded activations.
    bf16     float64 [R]: ||y_bf16 - y||^2, with inputs, weights and outputs of every convolution and linear layer
             rounded to bf16.
    macs     the share of the multiply-adds of each layer that has a rule.
    """

    layers: dict[str, torch.Tensor]
    bf16: torch.Tensor
    macs: dict[str, float]


@dataclass(frozen=True)
class _Quantizer:
    """What rounds a layer's input: behind its multiplier where it is balanced."""

    spec: QuantSpec
    qparams: QParams
    multiplier: torch.Tensor | None

    def __call__(self, x: torch.Tensor, ndim: int) -> torch.Tensor:
        """What it leaves of `x`; `ndim`: of the layer's weight."""
        if self.multiplier is None:
            return fake_quantize(x, self.qparams, self.spec)
        m = self.multiplier.to(x.device)
        q = fake_quantize(multiplied_input(x, m, ndim), self.qparams, self.spec)
        return (q / per_input_channel(m, ndim)).to(x.dtype)


def activation_errors(
    denoiser: nn.Module,
    pairs: PairStore,
    rules: Mapping[str, LayerRule],
    seen: Observations,
    *,
    metric: str = "mse",
    multipliers: Mapping[str, torch.Tensor] | None = None,
    state: Path | None = None,
    progress: bool = False,
) -> Errors:
    """The `Errors` of the layers in `rules` whose activations are integers.

    `multipliers`: of the balanced layers, of which `seen` holds what was observed behind them. A layer that it lacks is
    left out. Costs as many evaluations of `denoiser` as `PASSES` passes over the pairs: 2 to 32 pairs for
    each layer. Of more layers than that is enough for, those are measured whose own output has the most noise over
    signal. With `state`, a file, errors are kept layer by layer, and a killed run goes on from there to the same bits.
    `denoiser` is not changed. Raises `OctavoError` for a `state` that is not of this network.
    """
    layers, factors = dict(walk(denoiser)), multipliers or {}
    quantizers = {
        name: _Quantizer(
            rule.activations, seen.layers[name].qparams(rule.activations, metric), factors.get(name)
        )
        for name, rule in rules.items()
        if not rule.activations.is_float and name in seen.layers
    }
    affordable = int(PASSES * sum(len(batch) for batch in pairs))
    wanted = max(LEAST_PAIRS, min(MOST_PAIRS, affordable // max(1, len(quantizers))))
    rows = _spread(pairs, wanted)
    done = _load(state, quantizers, sum(map(len, rows))) if state and state.is_file() else {}
    with torch.inference_mode(), evaluating(denoiser):
        with _counted({name: layers[name] for name in rules}) as macs:
            outputs = [_output(denoiser, at_once) for at_once in rows]
        if len(quantizers) > (most := max(1, affordable // LEAST_PAIRS)):
            noise = _own_noise(denoiser, rows[0], layers, quantizers)
            noisiest = set(sorted(quantizers, key=noise.__getitem__, reverse=True)[:most])
            quantizers = {name: quantizer for name, quantizer in quantizers.items() if name in noisiest}
        for name in tqdm([BF16, *quantizers], desc="activation errors", unit="layer", disable=not progress):
            if name in done:
                continue
            changed = (
                _in_bf16(list(layers.values())) if name == BF16 else _rounded(layers[name], quantizers[name])
            )
            with changed:
                done[name] = [
                    error
                    for at_once, output in zip(rows, outputs, strict=True)
                    for error in _squares(_output(denoiser, at_once) - output, at_once)
                ]
            if state:
                write_json(state, done)
    total = max(1, sum(macs.values()))
    return Errors(
        {name: torch.tensor(done[name], dtype=torch.float64) for name in quantizers},
        torch.tensor(done[BF16], dtype=torch.float64),
        {name: count / total for name, count in macs.items()},
    )


def _spread(pairs: PairStore, wanted: int) -> list[Sequence[CalibrationPair]]:
    """So many pairs (or all), spread over the batches and their places, on no more rows than were denoised at once."""
    count = min(wanted, len(pairs))
    taken: list[CalibrationPair] = []
    at_once = 1
    for k in range(count):
        batch = pairs.load(k * len(pairs) // count)
        each = min(-(-wanted // count), len(batch))
        taken += [batch[(j * len(batch) // each + k) % len(batch)] for j in range(each)]
        at_once = max(at_once, len(next(iter(rows_at_once(batch)))))
    taken = taken[:wanted]
    return [taken[first : first + at_once] for first in range(0, len(taken), at_once)]


def _output(denoiser: nn.Module, rows: Sequence[CalibrationPair]) -> torch.Tensor:
    device = next(chain(denoiser.parameters(), denoiser.buffers())).device
    return first_output(denoiser(**call_arguments(denoiser, collate(rows, device)))).float()


def _squares(difference: torch.Tensor, pairs: Sequence[CalibrationPair]) -> list[float]:
    """The squared norm of each pair's rows: guidance gives a pair two."""
    rows = difference.double().square().flatten(1).sum(1)
    return [float(own.sum()) for own in rows.split([pair.num_rows for pair in pairs])]


@contextmanager
def _rounded(layer: Any, quantizer: _Quantizer) -> Iterator[None]:
    """Within the block the layer reads what its quantizer leaves of its input."""
    hook = layer.register_forward_pre_hook(
        lambda module, args: (quantizer(args[0], module.weight.ndim), *args[1:])
    )
    try:
        yield
    finally:
        hook.remove()


def _own_noise(
    denoiser: nn.Module,
    rows: Sequence[CalibrationPair],
    layers: Mapping[str, nn.Module],
    quantizers: Mapping[str, _Quantizer],
) -> dict[str, float]:
    """||W (x_q - x)||^2 / ||W x + b||^2 of each layer, in one evaluation."""
    noise = dict.fromkeys(quantizers, 0.0)

    def hook_of(name: str) -> Any:
        def look(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
            left = quantizers[name](args[0], module.weight.ndim)
            error = module.forward(left).float() - output.float()
            noise[name] = float(error.square().sum() / output.float().square().sum().clamp(min=1e-30))

        return look

    hooks = [layers[name].register_forward_hook(hook_of(name)) for name in quantizers]
    try:
        _output(denoiser, rows)
    finally:
        for hook in hooks:
            hook.remove()
    return noise


@contextmanager
def _in_bf16(layers: Sequence[Any]) -> Iterator[None]:
    """Within the block inputs, weights and outputs of the layers are rounded to bf16, one weight at a time."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16().to(x.dtype)

    def before(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        module.weight, kept = nn.Parameter(rounded(module.weight), requires_grad=False), module.weight
        module.__dict__["_kept"] = kept
        return (rounded(args[0]), *args[1:])

    def behind(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        module.weight = module.__dict__.pop("_kept")
        return rounded(output)

    hooks: list[Any] = []
    for layer in layers:
        hooks += [layer.register_forward_pre_hook(before), layer.register_forward_hook(behind)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            if "_kept" in layer.__dict__:  # an evaluation that was cut off
                layer.weight = layer.__dict__.pop("_kept")


@contextmanager
def _counted(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, int]]:
    """Multiply-adds of each layer in the evaluations within the block."""
    macs = dict.fromkeys(layers, 0)

    def hook_of(name: str, layer: Any) -> Any:
        def count(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            macs[name] += output.numel() * layer.weight[0].numel()

        return count

    hooks = [layer.register_forward_hook(hook_of(name, layer)) for name, layer in layers.items()]
    try:
        yield macs
    finally:
        for hook in hooks:
            hook.remove()


def _load(state: Path, names: Collection[str], pairs: int) -> dict[str, list[float]]:
    done = read_json(state)
    if (
        not isinstance(done, dict)
        or not set(done) <= {BF16, *names}
        or not all(isinstance(errors, list) and len(errors) == pairs for errors in done.values())
        or not all(type(error) is float for errors in done.values() for error in errors)
    ):
        raise OctavoError(f"{state}: not what was measured of this network; delete it and start again")
    return done

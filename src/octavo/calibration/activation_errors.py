"""What rounding one layer's activations does to the network's output, and what bf16 does, on a few pairs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from octavo.calibration.calls import watched_calls
from octavo.calibration.collect import PairStore
from octavo.calibration.kept_results import KeptResults, folder_beside
from octavo.calibration.observations import Observations
from octavo.calibration.rules import LayerRule
from octavo.calibration.spread import spread
from octavo.calibration.tracing import NETWORK_OUTPUT, evaluating, hooked, split_output
from octavo.diffusion import CalibrationPair, call_arguments, collate, first_output
from octavo.errors import OctavoError
from octavo.files import read_json, write_json
from octavo.quantization import QParams, QuantSpec, fake_quantize, walk
from octavo.quantization.balancing import multiplied_input, per_input_channel

MOST_PAIRS, LEAST_PAIRS, PASSES = 32, 2, 4
"""Pairs that each layer is measured on, at most and at least, where all layers together may take so many passes. (Pairs
that are evaluated in whole batches alone may be more.)"""
BF16 = "bf16"
FORMAT = 2
"""Of what is kept of a killed run; raised when other pairs are measured, or something else of them."""


@dataclass(frozen=True)
class Errors:
    """What was measured on R rows, and what a layer costs.

    layers     float64 [R] by layer: ||y_l - y||^2, with y the network's output on a row (without a learned variance,
               which no image shows) and y_l that where layer l alone reads rounded activations.
    bf16       float64 [R]: ||y_bf16 - y||^2, with inputs, weights and outputs of every convolution and linear layer
               rounded to bf16.
    macs       each layer's share of the multiply-adds of all layers that have a rule.
    estimated  float64 [R] by layer, of those that were not measured: the layer's own noise times the measured layers'
               median ratio of error to own noise.
    """

    layers: dict[str, torch.Tensor]
    bf16: torch.Tensor
    macs: dict[str, float]
    estimated: dict[str, torch.Tensor] = field(default_factory=dict)


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
    left out. Costs about as many evaluations of `denoiser` as `PASSES` passes over the pairs: 2 to 32 pairs for each
    layer, as far as there are so many. Of more layers than that is enough for, those are measured whose own output has
    the most noise over signal, and the others estimated by theirs. With `state`, a file, errors are kept layer by
    layer, a killed run goes on from there to the same bits, and what runs in front of a layer is computed anew from the
    last one's place on alone (`KeptResults`). `denoiser` is not changed. Raises `OctavoError` for a
    `state` that is not of this network.
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
    rows = spread(pairs, wanted)
    taken = sum(map(len, rows))
    done = _load(state, quantizers, taken) if state and state.is_file() else {}
    noise: dict[str, float] = {}
    with torch.inference_mode(), evaluating(denoiser), folder_beside(state) as folder:
        with _counted({name: layers[name] for name in rules}) as macs:
            outputs = [_output(denoiser, at_once) for at_once in rows]
        if len(quantizers) > (most := max(1, affordable // taken)):
            noise = _own_noise(denoiser, rows, layers, quantizers)
            noisiest = set(sorted(quantizers, key=noise.__getitem__, reverse=True)[:most])
            quantizers = {name: quantizer for name, quantizer in quantizers.items() if name in noisiest}
        if BF16 not in done:
            with _in_bf16(list(layers.values())):
                done[BF16] = _differences(denoiser, rows, outputs)
        left = [name for name in quantizers if name not in done]
        kept = None
        if folder and len(left) > 1:
            kept = KeptResults(denoiser, watched_calls(denoiser, lambda: _output(denoiser, rows[0])), folder)
            left = kept.calls.as_they_run(left)
        for i, name in enumerate(
            tqdm(left, desc="activation errors", unit="layer", disable=not progress or not left)
        ):
            if kept:
                kept.begin_pass(left[i:], is_last=i == len(left) - 1)
            with _rounded(layers[name], quantizers[name]):
                done[name] = _differences(denoiser, rows, outputs, kept)
            if state:
                write_json(state, {"format": FORMAT, "errors": done})
    total = max(1, sum(macs.values()))
    measured = {name: torch.tensor(done[name], dtype=torch.float64) for name in quantizers}
    return Errors(
        measured,
        torch.tensor(done[BF16], dtype=torch.float64),
        {name: count / total for name, count in macs.items()},
        _estimated(measured, noise),
    )


def _estimated(measured: Mapping[str, torch.Tensor], noise: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """Errors of the layers that have `noise` and were not measured, each row by the measured layers' median.

    >>> two = {"a": torch.tensor([2.0, 4.0]), "b": torch.tensor([2.0, 4.0])}
    >>> _estimated(two, {"a": 1.0, "b": 1.0, "c": 0.5})
    {'c': tensor([1., 2.])}
    """
    ratios = [errors / noise[name] for name, errors in measured.items() if noise.get(name)]
    if not ratios:
        return {}
    median = torch.stack(ratios).median(0).values
    return {name: median * own for name, own in noise.items() if name not in measured}


def _output(denoiser: nn.Module, rows: Sequence[CalibrationPair]) -> torch.Tensor:
    """What the network predicts, float32; a learned variance is left out."""
    device = next(chain(denoiser.parameters(), denoiser.buffers())).device
    call = collate(rows, device)
    output = first_output(denoiser(**call_arguments(denoiser, call)))
    return split_output(output, next(iter(call.values())).shape[1])[NETWORK_OUTPUT].float()


def _differences(
    denoiser: nn.Module,
    rows: Sequence[Sequence[CalibrationPair]],
    outputs: Sequence[torch.Tensor],
    kept: KeptResults | None = None,
) -> list[float]:
    """||y - y'||^2 of each pair, with y' its output in `outputs` and y what the network predicts now."""
    errors: list[float] = []
    for number, (at_once, output) in enumerate(zip(rows, outputs, strict=True)):
        with kept.evaluation(number) if kept else nullcontext():
            errors += _squares(_output(denoiser, at_once) - output, at_once)
    return errors


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
    with hooked([hook]):
        yield


def _own_noise(
    denoiser: nn.Module,
    rows: Sequence[Sequence[CalibrationPair]],
    layers: Mapping[str, nn.Module],
    quantizers: Mapping[str, _Quantizer],
) -> dict[str, float]:
    """||W (x_q - x)||^2 / ||W x + b||^2 of each layer, over all of its calls, in one evaluation of each of `rows`."""
    errors, signals = dict.fromkeys(quantizers, 0.0), dict.fromkeys(quantizers, 0.0)

    def hook_of(name: str) -> Any:
        def look(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
            left = quantizers[name](args[0], module.weight.ndim)
            errors[name] += float((module.forward(left).float() - output.float()).square().sum())
            signals[name] += float(output.float().square().sum())

        return look

    hooks = [layers[name].register_forward_hook(hook_of(name)) for name in quantizers]
    with hooked(hooks):
        for at_once in rows:
            _output(denoiser, at_once)
    return {name: errors[name] / max(signals[name], 1e-30) for name in quantizers}


@contextmanager
def _in_bf16(layers: Sequence[Any]) -> Iterator[None]:
    """Within the block inputs, weights and outputs of the layers are rounded to bf16, one weight at a time.

    float16 ends before bf16's next number, 65536: what would be rounded to that stays at float16's largest.
    """

    def rounded(x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float16:
            largest = torch.finfo(x.dtype).max
            return x.bfloat16().float().clamp(-largest, largest).to(x.dtype)
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
        with hooked(hooks):
            yield
    finally:
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
    with hooked(hooks):
        yield macs


def _load(state: Path, names: Collection[str], pairs: int) -> dict[str, list[float]]:
    """What is kept of a killed run; nothing where it is of another `FORMAT`."""
    found = read_json(state)
    if isinstance(found, dict) and found.get("format") != FORMAT:
        return {}
    done = found.get("errors") if isinstance(found, dict) else None
    if (
        not isinstance(done, dict)
        or not set(done) <= {BF16, *names}
        or not all(isinstance(errors, list) and len(errors) == pairs for errors in done.values())
        or not all(type(error) is float for errors in done.values() for error in errors)
    ):
        raise OctavoError(f"{state}: not what was measured of this network; delete it and start again")
    return done

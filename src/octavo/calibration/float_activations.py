"""Which layers keep float activations: those that err most at the output, until int8 errs less than bf16 would.

Errors are far from even: what reads the residual stream as it is (shortcuts, down- and upsampling) and attention's
layers err most and multiply least. Their weights stay integers on disk; their products are float ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
from octavo.quantization import FLOAT, QParams, QuantSpec, fake_quantize, walk
from octavo.quantization.balancing import multiplied_input, per_input_channel

MOST_PAIRS, LEAST_PAIRS, PASSES = 32, 2, 4
"""Pairs that each layer is measured on, at most and at least, where all layers together may take so many passes."""
ANY_LAYER = 0.1
"""What a float layer costs by being one, in multiply-adds of the average layer: passes over its input and output."""
MARGIN = 10**-0.1
"""1 dB: how much less than bf16's the error is to be."""
BF16 = "bf16"


def keep_float(
    rules: Mapping[str, LayerRule],
    share: float,
    denoiser: nn.Module,
    pairs: PairStore,
    seen: Observations,
    *,
    metric: str = "mse",
    multipliers: Mapping[str, torch.Tensor] | None = None,
    state: Path | None = None,
    progress: bool = False,
) -> tuple[dict[str, LayerRule], dict[str, Any]]:
    """The rules with float activations for some layers, and JSON-safe what is to be remembered of it.

    With y the network's output on calibration pair r, and y_l that where layer l alone reads rounded activations:

        e[l, r] = ||y_l - y||^2,   b[r] = ||y_bf16 - y||^2

    Layers are taken in the order of mean_r (e[l, r] / sum_k e[k, r]) over their cost, as long as they fit into `share`
    of the cost of all, until mean_r log(sum_l e[l, r] / b[r]) of those that are left is below log 0.79: 1 dB nearer
    than bf16. A layer's cost is its share of the multiply-adds, and `ANY_LAYER` of the average layer's. y_bf16: inputs,
    weights and outputs of every convolution and linear layer rounded to bf16. `multipliers`: of the balanced layers, of
    which `seen` holds what was observed behind them.

    Costs as many evaluations of `denoiser` as four passes over the pairs: 2 to 32 pairs for each layer. Of more layers
    than that is enough for, those are measured whose own output has the most noise over signal. With `state`, a file,
    errors are kept layer by layer, and a killed run goes on from there to the same choice. `denoiser` is not changed.
    """
    candidates = [name for name, rule in rules.items() if not rule.activations.is_float]
    if share <= 0 or not candidates:
        return dict(rules), {}
    errors, costs = _measured(
        denoiser, pairs, rules, candidates, seen, metric, multipliers or {}, state, progress
    )
    candidates = [name for name in candidates if name in errors]
    of_bf16 = torch.tensor(errors.pop(BF16), dtype=torch.float64)
    of_layers = torch.tensor([errors[name] for name in candidates], dtype=torch.float64)
    before = _over(of_layers.sum(0), of_bf16)
    worth = {
        name: worth / costs[name] for name, worth in zip(candidates, _shares(of_layers), strict=True) if worth
    }
    left, room, chosen = of_layers.sum(0), share, []
    for name in sorted(worth, key=worth.__getitem__, reverse=True):
        if _over(left, of_bf16) <= MARGIN:
            break
        if costs[name] <= room:
            room -= costs[name]
            left = left - of_layers[candidates.index(name)]
            chosen.append(name)
    summary = {
        "layers": [name for name in rules if name in chosen],
        "cost": round(sum(costs[name] for name in chosen), 4),
        "error_over_bf16": [round(before, 4), round(_over(left, of_bf16), 4)],
    }
    floats = {name: replace(rules[name], activations=QuantSpec(FLOAT)) for name in chosen}
    return {**rules, **floats}, summary


def _over(errors: torch.Tensor, of_bf16: torch.Tensor) -> float:
    """The geometric mean over rows of one squared error over another; tiny ones are no zeros."""
    tiny = torch.finfo(torch.float64).tiny
    return math.exp(float((errors.clamp(min=tiny).log() - of_bf16.clamp(min=tiny).log()).mean()))


def _shares(errors: torch.Tensor) -> list[float]:
    """`[layers, rows]` => each layer's mean share of a row's errors; 0 of rows without any.

    >>> _shares(torch.tensor([[3.0, 0.0], [1.0, 0.0]]).double())
    [0.375, 0.125]
    """
    of_rows = errors.sum(0)
    shares: list[float] = (errors / torch.where(of_rows > 0, of_rows, 1.0)).mean(1).tolist()
    return shares


def _measured(
    denoiser: nn.Module,
    pairs: PairStore,
    rules: Mapping[str, LayerRule],
    candidates: Sequence[str],
    seen: Observations,
    metric: str,
    multipliers: Mapping[str, torch.Tensor],
    state: Path | None,
    progress: bool,
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """The errors of each candidate, and of bf16, on each row; and the cost of each candidate."""
    layers = dict(walk(denoiser))
    affordable = PASSES * sum(len(batch) for batch in pairs)
    rows = _spread(pairs, max(LEAST_PAIRS, min(MOST_PAIRS, int(affordable // len(candidates)))))
    done = _load(state, candidates) if state and state.is_file() else {}
    with torch.inference_mode(), evaluating(denoiser):
        with _counted({name: layers[name] for name in rules}) as macs:
            outputs = [_output(denoiser, at_once) for at_once in rows]
        quantizers = {
            name: (seen.layers[name].qparams(rules[name].activations, metric), multipliers.get(name))
            for name in candidates
        }
        most = max(1, int(affordable // LEAST_PAIRS))
        if len(candidates) > most:
            noise = _own_noise(denoiser, rows[0], layers, rules, quantizers)
            noisiest = sorted(candidates, key=noise.__getitem__, reverse=True)[:most]
            candidates = [name for name in candidates if name in noisiest]
        for name in tqdm([BF16, *candidates], desc="float activations", unit="layer", disable=not progress):
            if name in done:
                continue
            if name == BF16:
                rounded = _in_bf16(list(layers.values()))
            else:
                rounded = _input_rounded(layers[name], rules[name], *quantizers[name])
            with rounded:
                done[name] = [
                    error
                    for at_once, output in zip(rows, outputs, strict=True)
                    for error in _squares(_output(denoiser, at_once) - output)
                ]
            if state:
                write_json(state, done)
    total = max(1, sum(macs.values()))
    return done, {name: macs[name] / total + ANY_LAYER / len(rules) for name in candidates}


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


def _squares(difference: torch.Tensor) -> list[float]:
    squares: list[float] = difference.double().square().flatten(1).sum(1).tolist()
    return squares


@contextmanager
def _input_rounded(
    layer: nn.Module, rule: LayerRule, qparams: QParams, multiplier: torch.Tensor | None
) -> Iterator[None]:
    """Within the block the layer reads what its quantizer leaves of its input."""
    ndim: Any = layer.weight.ndim
    hook = layer.register_forward_pre_hook(
        lambda module, args: (_left_of(args[0], ndim, rule, qparams, multiplier), *args[1:])
    )
    try:
        yield
    finally:
        hook.remove()


def _left_of(
    x: torch.Tensor, ndim: int, rule: LayerRule, qparams: QParams, multiplier: torch.Tensor | None
) -> torch.Tensor:
    """What a layer's quantizer leaves of its input; `ndim`: of its weight."""
    if multiplier is None:
        return fake_quantize(x, qparams, rule.activations)
    m = multiplier.to(x.device)
    q = fake_quantize(multiplied_input(x, m, ndim), qparams, rule.activations)
    return (q / per_input_channel(m, ndim)).to(x.dtype)


def _own_noise(
    denoiser: nn.Module,
    rows: Sequence[CalibrationPair],
    layers: Mapping[str, nn.Module],
    rules: Mapping[str, LayerRule],
    quantizers: Mapping[str, tuple[QParams, torch.Tensor | None]],
) -> dict[str, float]:
    """||W (x_q - x)||^2 / ||W x + b||^2 of each layer, in one evaluation."""
    noise = dict.fromkeys(quantizers, 0.0)

    def hook_of(name: str) -> Any:
        def look(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
            left = _left_of(args[0], module.weight.ndim, rules[name], *quantizers[name])
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


def _load(state: Path, candidates: Sequence[str]) -> dict[str, list[float]]:
    done = read_json(state)
    if not isinstance(done, dict) or not set(done) <= {BF16, *candidates}:
        raise OctavoError(f"{state}: not what was measured of this network; delete it and start again")
    return {str(name): [float(error) for error in errors] for name, errors in done.items()}

"""Channel balancing: spread the work of rounding between a layer's input channels and its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from octavo.calibration.collect import PairStore
from octavo.calibration.evaluate import evaluate, evaluations
from octavo.calibration.rules import LayerRule
from octavo.calibration.tracing import evaluating, hooked
from octavo.errors import OctavoError
from octavo.files import atomic_path
from octavo.quantization import HistogramObserver, fake_quantize, round_nearest, walk
from octavo.quantization.balancing import divided_weight, multiplied_input
from octavo.quantization.layers import convolution_of

STRENGTHS = (0.25, 0.5, 0.75)
LEAST_GAIN = 0.02
"""A layer is balanced only where its output error falls by this fraction: a multiplication is not quite free."""
SHARED_LOSS = 1.1
"""Layers share a multiplier if their errors are at most this many times what each layer's own multiplier leaves."""
MOST_OUTPUTS = 256
"""A strength's error is the mean over so many output channels, evenly spread, of a layer that has more."""
SAMPLE_BYTES = 512 * 2**20
WANTED_INPUTS = 24
WEIGHT_SHARE = {"nearest": 1.0, "gptq": 0.4}
"""How much of the error of rounding weights to nearest each rounding leaves (docs/log.md, 2026-11-23)."""


def multipliers(
    denoiser: nn.Module,
    pairs: PairStore,
    rules: Mapping[str, LayerRule],
    *,
    metric: str = "mse",
    rounding: str = "nearest",
    together: Sequence[Sequence[str]] = (),
    seed: int = 0,
    state: Path | None = None,
    progress: bool = True,
) -> dict[str, torch.Tensor]:
    """Factors for the input channels of each layer that gains by them: layer name -> float32 `[input channels]`.

    Input channel j is multiplied by m[j] in front of the activation quantizer and its weights are divided by it
    (SmoothQuant, 2211.10438, eq. 4): 1 / m[j] = max|x_j|^a / max|w_j|^(1 - a), of geometric mean 1. The strength a is
    searched for each layer: none, 0.25, 0.5, 0.75; the one with the least error of the layer's output wins, on a
    sample of what the float network hands it and of its output channels. `together`: the names of layers that read
    one tensor, which get one multiplier if that loses little (`best_shared_multiplier`), else each its own.
    Convolutions with groups are left alone. With `state`, a file, a finished search is not made again. `denoiser` is
    not changed.
    """
    if state is not None and state.is_file():
        return _load(state)
    layers = {
        name: layer
        for name, layer in walk(denoiser)
        if name in rules and not rules[name].activations.is_float and getattr(layer, "groups", 1) == 1
    }
    samples = sample_inputs(denoiser, pairs, layers, seed=seed, progress=progress)
    found: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for names in together:
            if len(names) > 1 and all(name in samples for name in names):
                shared = [(layers[name], samples[name], rules[name]) for name in names]
                m = best_shared_multiplier(shared, metric, WEIGHT_SHARE[rounding])
                found.update({} if m is None else dict.fromkeys(names, m))
        for name, inputs in tqdm(samples.items(), desc="balance", unit="layer", disable=not progress):
            if name in found:
                continue
            m = best_multiplier(layers[name], inputs, rules[name], metric, WEIGHT_SHARE[rounding])
            if m is not None:
                found[name] = m
    if state is not None:
        with atomic_path(state) as temporary:
            save_file({name: m.clone() for name, m in found.items()}, temporary, metadata={"balance": "1"})
    return found


def sample_inputs(
    denoiser: nn.Module,
    pairs: PairStore,
    layers: Mapping[str, nn.Module],
    *,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, list[torch.Tensor]]:
    """Some inputs of each layer, spread over the calibration pairs: one row each, cropped so that all fit in memory."""
    generator = torch.Generator().manual_seed(seed)
    limit = SAMPLE_BYTES // (4 * WANTED_INPUTS * max(1, len(layers)))
    taken: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    every = max(1, -(-evaluations(pairs) // WANTED_INPUTS))
    with torch.inference_mode(), evaluating(denoiser), _sampled(layers, taken, limit, generator):
        batches = tqdm(pairs, desc="sample inputs", unit="batch", total=len(pairs), disable=not progress)
        evaluate(denoiser, batches, every=every)
    return taken


def best_multiplier(
    layer: nn.Module, inputs: list[torch.Tensor], rule: LayerRule, metric: str, weight_share: float
) -> torch.Tensor | None:
    """The multiplier of the best strength; None where balancing gains less than `LEAST_GAIN`.

    A strength's error is E ||W (x - x_q)||^2 + weight_share * E ||(W - W_q) x_q||^2, which are all but independent.
    """
    candidates = _candidates([(layer, inputs, rule)])
    if not candidates:
        return None
    errors = _errors(layer, inputs, rule, candidates, metric, weight_share)
    best = min(range(len(candidates)), key=errors.__getitem__)
    return candidates[best] if errors[best] < (1 - LEAST_GAIN) * errors[0] else None


def best_shared_multiplier(
    readers: Sequence[tuple[nn.Module, list[torch.Tensor], LayerRule]], metric: str, weight_share: float
) -> torch.Tensor | None:
    """The best multiplier for layers that read one tensor, each with a sample of it; None where they do without.

    Candidates are those of `best_multiplier` for the largest weight of all. What counts is the geometric mean over the
    layers of (error / error without balancing): it must be below 1 - `LEAST_GAIN`, and at most `SHARED_LOSS` times what
    it is with a multiplier of each layer's own.
    """
    shared = _candidates(readers)
    if not shared:
        return None
    logs = torch.zeros(len(shared))
    of_their_own = 0.0
    for layer, inputs, rule in readers:
        errors = torch.tensor(_errors(layer, inputs, rule, shared, metric, weight_share))
        own = torch.tensor(
            _errors(layer, inputs, rule, _candidates([(layer, inputs, rule)]), metric, weight_share)
        )
        if not bool((errors > 0).all()) or not bool((own > 0).all()):
            return None
        logs += (errors / errors[0]).log() / len(readers)
        of_their_own += float((own / own[0]).log().min()) / len(readers)
    best = int(logs.argmin())
    score = float(logs[best].exp())
    pays = score < 1 - LEAST_GAIN and score <= SHARED_LOSS * math.exp(of_their_own)
    return shared[best] if pays else None


def _candidates(
    readers: Sequence[tuple[nn.Module, list[torch.Tensor], LayerRule]],
) -> list[torch.Tensor]:
    """No balancing and each strength, by the largest inputs and weights of all readers; none of layers that are 0."""
    largest_inputs, largest_weights = [], []
    for layer, inputs, _ in readers:
        weight = _weight(layer)
        largest_inputs += [_by_channel(x, weight).abs().amax(dim=1) for x in inputs]
        largest_weights.append(weight.transpose(0, 1).flatten(1).abs().amax(dim=1))
    largest_input = torch.stack(largest_inputs).amax(dim=0)
    largest_weight = torch.stack(largest_weights).amax(dim=0)
    if not bool((largest_input > 0).any()) or not bool((largest_weight > 0).any()):
        return []
    none = torch.ones_like(largest_input)
    return [none, *(_multiplier(largest_input, largest_weight, strength) for strength in STRENGTHS)]


def _errors(
    layer: nn.Module,
    inputs: list[torch.Tensor],
    rule: LayerRule,
    candidates: list[torch.Tensor],
    metric: str,
    weight_share: float,
) -> list[float]:
    weight = _weight(layer)
    if len(weight) > MOST_OUTPUTS:
        weight = weight[torch.arange(MOST_OUTPUTS) * len(weight) // MOST_OUTPUTS]
    return [_output_error(layer, weight, inputs, m, rule, metric, weight_share) for m in candidates]


def _weight(layer: nn.Module) -> torch.Tensor:
    weight: torch.Tensor = layer.weight.detach().float().cpu()  # type: ignore[operator]
    return weight


def _multiplier(inputs: torch.Tensor, weights: torch.Tensor, strength: float) -> torch.Tensor:
    inputs, weights = (x.clamp_min(1e-5 * float(x.max())) for x in (inputs, weights))
    log_factor = strength * inputs.log() - (1 - strength) * weights.log()
    return (log_factor.mean() - log_factor).exp()


def _output_error(
    layer: Any,
    weight: torch.Tensor,
    inputs: list[torch.Tensor],
    m: torch.Tensor,
    rule: LayerRule,
    metric: str,
    weight_share: float,
) -> float:
    observer = HistogramObserver()
    for x in inputs:
        observer.observe(multiplied_input(x, m, weight.ndim))
    qparams = observer.qparams(rule.activations, metric)
    balanced = divided_weight(weight, m)
    integers, weight_qparams = round_nearest(balanced, rule.weights, metric)
    rounded = integers.float() * weight_qparams.scale.view(-1, *[1] * (weight.ndim - 1))
    of_inputs = of_weights = 0.0
    for x in inputs:
        scaled = multiplied_input(x, m, weight.ndim)
        quantized = fake_quantize(scaled, qparams, rule.activations)
        of_inputs += float(_apply(layer, scaled - quantized, balanced).square().mean())
        of_weights += float(_apply(layer, quantized, balanced - rounded).square().mean())
    return of_inputs + weight_share * of_weights


def _apply(layer: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if weight.ndim == 2:
        return nn.functional.linear(x, weight)
    convolution = convolution_of(weight)
    return convolution(x, weight, None, layer.stride, "valid", layer.dilation)


def _by_channel(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """One row's input as `[input channels, values]`."""
    return x.reshape(-1, x.shape[-1]).T if weight.ndim == 2 else x[0].flatten(1)


@contextmanager
def _sampled(
    layers: Mapping[str, nn.Module],
    taken: dict[str, list[torch.Tensor]],
    limit: int,
    generator: torch.Generator,
) -> Iterator[None]:
    def hook_of(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].detach()
            row = int(torch.randint(len(x), (), generator=generator))
            taken[name].append(_crop(x[row : row + 1].float().cpu(), layer, limit, generator))

        return hook

    hooks = [layer.register_forward_pre_hook(hook_of(name)) for name, layer in layers.items()]
    with hooked(hooks):
        yield


def _crop(x: torch.Tensor, layer: Any, limit: int, generator: torch.Generator) -> torch.Tensor:
    """A window of a row's input with at most about `limit` values, and never smaller than the kernel."""
    is_linear = isinstance(layer, nn.Linear)
    dims = list(range(1, x.ndim - 1)) if is_linear else list(range(2, x.ndim))
    least = (
        [1] * len(dims)
        if is_linear
        else [step * (size - 1) + 1 for size, step in zip(layer.kernel_size, layer.dilation, strict=True)]
    )
    channels = x.shape[-1] if is_linear else x.shape[1]
    side = max(1, int((limit / channels) ** (1 / max(1, len(dims)))))
    if not is_linear:
        padding = [(0, 0) if isinstance(layer.padding, str) else (p, p) for p in layer.padding]
        if not isinstance(layer.padding, str):
            x = nn.functional.pad(x, [value for pair in reversed(padding) for value in pair])
    for dim, smallest in zip(dims, least, strict=True):
        length = min(x.shape[dim], max(side, smallest))
        start = int(torch.randint(x.shape[dim] - length + 1, (), generator=generator))
        x = x.narrow(dim, start, length)
    return x.clone()


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise OctavoError(f"{path}: not readable; delete it and start again") from error

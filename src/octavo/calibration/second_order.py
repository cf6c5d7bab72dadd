"""Round a quantized network's weights again, each layer by the second moments of what it really reads."""

from __future__ import annotations

import json
import logging
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from octavo.calibration.calls import Calls, watched_calls
from octavo.calibration.collect import PairStore
from octavo.calibration.evaluate import evaluate_rows, evaluations, rows_at_once
from octavo.calibration.kept_results import LEFT_FREE, KeptResults, folder_beside
from octavo.calibration.tracing import evaluating, hooked
from octavo.errors import OctavoError
from octavo.files import atomic_path
from octavo.memory import give_back, let_go
from octavo.quantization import QParams, QuantLayer, quantized_layers, walk
from octavo.quantization.balancing import divided_weight
from octavo.quantization.gptq import round_layer
from octavo.quantization.moments import SecondMoment, moment_bytes

logger = logging.getLogger(__name__)
MOMENT_BYTES = 768 * 2**20
"""Second moments held at a time; more layers than fit take another pass over the pairs."""


@dataclass(frozen=True)
class Rounded:
    """What second-order rounding did to one layer.

    `before`, `after`: E ||W x - Q x||^2 by the observed second moment, rounded to nearest and now.
    `is_approximate`: only diagonal blocks of the moment fitted.
    """

    layer: str
    before: float
    after: float
    is_approximate: bool


def round_again(
    quantized: nn.Module,
    original: nn.Module,
    pairs: PairStore,
    *,
    seed: int = 0,
    state: Path | None = None,
    progress: bool = True,
) -> list[Rounded]:
    """Replace each quantized layer's integers by what `octavo.quantization.gptq` finds; scales stay.

    `quantized` (changed in place) is evaluated on the calibration pairs, so that a layer sees inputs which carry the
    error of the layers before it. Layers are taken in the order in which they run, as many at a time as
    `MOMENT_BYTES` of second moments allow; the layers of one pass see those of earlier passes rounded already. An
    evaluation ends where its pass has seen all of its layers. `original`: the float network. With `state`, a file,
    every pass is kept, and a killed run goes on from there to the same bits; and each part of the network is computed
    twice, not once for each pass behind it (`KeptResults`, in a folder beside the file while this runs).
    """
    layers = dict(quantized_layers(quantized))
    offsets = {name: i for i, name in enumerate(layers)}
    weights = {name: layer.weight for name, layer in walk(original) if name in layers}
    done, order = _load(state, layers) if state else ([], [])
    left = {name: layer for name, layer in layers.items() if name not in {row.layer for row in done}}
    let_go(original.state_dict().values())  # of these a layer's weights are read at a time from here on
    calls, passes = Calls([]), _passes(left)
    with torch.inference_mode(), evaluating(quantized), folder_beside(state) as folder:
        if len(passes) > 1:
            first = next(iter(rows_at_once(pairs.load(0))))
            calls = watched_calls(quantized, lambda: evaluate_rows(quantized, first))
            order = order or calls.as_they_run(left)
            passes = _passes({name: left[name] for name in order if name in left})
        kept = None
        if folder and calls:
            stored = sum(layer.weight_int8.nbytes for layer in layers.values())
            room = LEFT_FREE + 2 * stored  # for a state, and the next beside it
            kept = KeptResults(quantized, calls, folder, left_free=room)
        times = Counter(call.module for call in calls)
        total = len(passes) * len(pairs)
        with tqdm(total=total, desc="round", unit="batch", disable=not progress) as bar:
            for i, names in enumerate(passes):
                moments = {
                    name: SecondMoment(
                        layers[name], evaluations(pairs), seed=seed * len(layers) + offsets[name]
                    )
                    for name in names
                }
                if kept:
                    kept.begin_pass(set().union(*passes[i:]), is_last=i == len(passes) - 1)
                numbers = count()
                for batch in pairs:
                    for rows in rows_at_once(batch):
                        with (
                            kept.evaluation(next(numbers)) if kept else nullcontext(),
                            suppress(_AllSeen),
                            _observed(layers, moments, times),
                        ):
                            evaluate_rows(quantized, rows)
                    bar.update(1)
                for name in sorted(names, key=lambda name: _moment_bytes(layers[name])):
                    # the widest last: rounding it takes the most, and other layers' moments are gone by then
                    give_back()
                    done.append(_round(name, layers[name], weights[name], moments.pop(name)))
                    let_go([weights[name]])
                give_back()
                if state:
                    _save(state, layers, done, order)
    return sorted(done, key=lambda row: offsets[row.layer])


def summary(rows: Sequence[Rounded]) -> dict[str, Any]:
    """JSON-safe: how many layers, the median of after / before, and the layers of which only blocks were seen."""
    ratios = [row.after / row.before for row in rows if row.before > 0]
    return {
        "layers": len(rows),
        "median_error_over_nearest": round(statistics.median(ratios), 4) if ratios else None,
        "diagonal_blocks": [row.layer for row in rows if row.is_approximate],
    }


def _passes(layers: Mapping[str, QuantLayer]) -> list[list[str]]:
    """Layer names in order, cut so that the second moments of a pass fit (or are one layer's)."""
    passes: list[list[str]] = []
    free = 0
    for name, layer in layers.items():
        size = _moment_bytes(layer)
        if not passes or size > free:
            passes.append([])
            free = MOMENT_BYTES
        passes[-1].append(name)
        free -= size
    return passes


def _moment_bytes(layer: QuantLayer) -> int:
    return moment_bytes(layer.weight_int8, getattr(layer, "groups", 1))


class _AllSeen(BaseException):
    """Ends an evaluation. Not an Exception, so that no `except Exception` in a network swallows it."""


@contextmanager
def _observed(
    layers: Mapping[str, QuantLayer], moments: dict[str, SecondMoment], calls: Mapping[str, int]
) -> Iterator[None]:
    """One evaluation within the block, which ends by `_AllSeen` with the last of the `calls`, if any are known."""
    left = {name: calls[name] for name in moments if name in calls}

    def hook_of(name: str, moment: SecondMoment) -> Any:
        def look(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            moment.observe(args[0])
            if name in left:
                left[name] -= 1
                if not any(left.values()):
                    raise _AllSeen

        return look

    hooks = [
        layers[name].register_forward_pre_hook(hook_of(name, moment)) for name, moment in moments.items()
    ]
    with hooked(hooks):
        yield


def _round(name: str, layer: QuantLayer, weight: torch.Tensor, moment: SecondMoment) -> Rounded:
    value, groups = moment.value(), int(getattr(layer, "groups", 1))
    weight, scale = weight.detach().float().cpu(), layer.weight_scale.cpu()
    if layer.input_multiplier is not None:
        weight = divided_weight(weight, layer.input_multiplier.cpu())
    groups_of_columns = layer.group_multiplier.cpu() if layer.group_multiplier is not None else None
    qparams = QParams(scale, torch.zeros_like(scale, dtype=torch.int32), groups_of_columns)
    rounding = round_layer(weight, value, groups, qparams, layer.weight_spec)
    layer.weight_int8.copy_(rounding.integers)
    if moment.is_approximate:
        logger.warning(
            "%s: rows of %d inputs; only diagonal blocks of their second moment were kept",
            name,
            weight[0].numel(),
        )
    return Rounded(name, rounding.nearest_error, rounding.error, moment.is_approximate)


def _save(
    path: Path, layers: Mapping[str, QuantLayer], done: Sequence[Rounded], order: Sequence[str]
) -> None:
    rows = [[row.layer, row.before, row.after, row.is_approximate] for row in done]
    tensors = {row.layer: layers[row.layer].weight_int8 for row in done}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"done": json.dumps(rows), "order": json.dumps(order)})


def _load(path: Path, layers: Mapping[str, QuantLayer]) -> tuple[list[Rounded], list[str]]:
    """What an earlier run rounded, put into the layers, and the order in which it took them."""
    if not path.is_file():
        return [], []
    try:
        with safe_open(path, "pt") as file:
            done, order = (json.loads(file.metadata()[key]) for key in ("done", "order"))
            done = [Rounded(*row) for row in done]
            for row in done:
                layers[row.layer].weight_int8.copy_(file.get_tensor(row.layer))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise OctavoError(f"{path}: not readable; delete it and start again") from error
    return done, order

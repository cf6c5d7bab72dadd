"""What quantization does to the network's output at each timestep, measured on calibration pairs and taken back."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from octavo.calibration.collect import PairStore
from octavo.calibration.evaluate import rows_at_once
from octavo.calibration.operations import timestep_of
from octavo.calibration.tracing import NETWORK_OUTPUT, evaluating, split_output
from octavo.diffusion import CalibrationPair, collate
from octavo.errors import OctavoError
from octavo.files import atomic_path
from octavo.quantization import OutputCorrection, walk

KINDS = ("none", "mean", "k and mean")
HALVES = (0, 1)
LEAST_PAIRS = 4
"""Pairs in each of the two halves by which a correction is judged; neighbouring timesteps are pooled to have them."""

_COUNT, _E, _D, _EE, _DE, _DD = range(6)
Sums = torch.Tensor
"""float64 [6, C]: of each output channel the number of elements, and their sums of e, d, e^2, d e and d^2."""


@dataclass(frozen=True)
class Step:
    """One entry of the table: neighbouring timesteps pooled, and the correction that held-out pairs chose.

    timestep   the mean of the pairs' timesteps.
    pairs      how many network inputs of single images were pooled.
    kind       "none", "mean" (k = 0), or "k and mean".
    held_out   the mean squared error of pairs that the correction was not fitted on, over theirs without it.
    k, mean    what is stored; mean float64 [C].
    """

    timestep: float
    pairs: int
    kind: str
    held_out: float
    k: float
    mean: torch.Tensor


def fit_output_correction(
    quantized: nn.Module,
    original: nn.Module,
    pairs: PairStore,
    *,
    state: Path | None = None,
    progress: bool = True,
) -> tuple[OutputCorrection | None, list[Step]]:
    """The correction that the error of `quantized`'s output on the calibration pairs asks for. Nothing is changed.

    With e the output of `original` and d = e_q - e the error of `quantized` on the same input, at each timestep

        k       = sum_c Cov(d_c, e_c) / sum_c Var(e_c)      samples: pairs and positions
        mean[c] = E[d_c - k e_c]

    so that (e_q - mean) / (1 + k) is e and a residual that is 0 on average and not correlated with e. Source: PTQD
    (2305.10657), section 4.2. A learned variance is left as it is.

    Neighbouring timesteps are pooled until images with an even and images with an odd number have `LEAST_PAIRS` each.
    Of no correction, the mean alone, and both, that one is taken which, fitted on one half, leaves the least error in
    the other: at some timesteps either may do harm (docs/log.md). If nothing helps anywhere there is no correction.

    Costs an evaluation of both networks on every pair. Memory: 12 numbers for each timestep and channel. With
    `state`, a file, they are written after each batch, and a killed run goes on from there to the same bits. Raises
    `OctavoError` for a network that is told no timestep, or several for a row, and for a damaged `state`.
    """
    seen = _load(state) if state and state.is_file() else _Seen()
    batches = tqdm(
        range(seen.batches, len(pairs)),
        desc="correct output",
        unit="batch",
        initial=seen.batches,
        total=len(pairs),
        disable=not progress,
    )
    with torch.inference_mode(), evaluating(quantized), evaluating(original):
        for i in batches:
            for rows in rows_at_once(pairs.load(i)):
                _observe(seen, rows, quantized, original)
            seen.batches = i + 1
            if state:
                _save(state, seen)
    steps = [_step(*pooled) for pooled in _pooled(seen.sums, seen.pairs)]
    if all(step.kind == "none" for step in steps):
        return None, steps
    mean = torch.stack([step.mean for step in steps]).view(len(steps), *seen.shape)
    timesteps, k = (torch.tensor([getattr(step, name) for step in steps]) for name in ("timestep", "k"))
    return OutputCorrection(timesteps, k, mean).to(next(original.parameters()).device), steps


def summary(steps: Sequence[Step]) -> dict[str, Any]:
    """JSON-safe: how many timesteps, what was chosen at how many of them, and how much error that leaves."""
    return {
        "timesteps": len(steps),
        **{kind.replace(" ", "_"): sum(step.kind == kind for step in steps) for kind in KINDS},
        "median_held_out_error": round(statistics.median(step.held_out for step in steps), 4),
    }


@dataclass
class _Seen:
    """Sums by (timestep, half), the number of pairs behind each, the shape of a mean, and the batches that are in."""

    sums: dict[tuple[float, int], Sums] = field(default_factory=dict)
    pairs: dict[tuple[float, int], int] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    batches: int = 0


def _observe(seen: _Seen, rows: Sequence[CalibrationPair], quantized: nn.Module, original: nn.Module) -> None:
    """Evaluate both networks on `rows` and add what each pair shows to its timestep and half."""
    device = next(chain(original.parameters(), original.buffers())).device
    call = collate(rows, device)
    timesteps = timestep_of(original, (), call).double()
    in_channels = next(iter(call.values())).shape[1]
    e, e_q = (
        split_output(network(**{**call, "return_dict": False})[0], in_channels)[NETWORK_OUTPUT].double()
        for network in (original, quantized)
    )
    channel = _channel_dim(original, e)
    seen.shape = tuple(size if dim == channel else 1 for dim, size in enumerate(e.shape))[1:]
    timesteps = timesteps.expand(len(e)) if timesteps.ndim == 0 else timesteps
    ends = list(accumulate(pair.num_rows for pair in rows))
    for pair, end in zip(rows, ends, strict=True):
        mine = slice(end - pair.num_rows, end)
        key = (float(timesteps[end - 1]), pair.image % 2)
        sums = _sums(e[mine].movedim(channel, 0).flatten(1), e_q[mine].movedim(channel, 0).flatten(1))
        seen.sums[key] = seen.sums[key] + sums if key in seen.sums else sums
        seen.pairs[key] = seen.pairs.get(key, 0) + 1


def _channel_dim(network: nn.Module, output: torch.Tensor) -> int:
    """1, or the last where the output is [rows, tokens, C]: then it is a fully connected layer that writes it."""
    *_, (_, last) = walk(network)
    return 2 if output.ndim == 3 and isinstance(last, nn.Linear) else 1


def _sums(e: torch.Tensor, e_q: torch.Tensor) -> Sums:
    """Of `e` and `e_q` [C, samples], float64."""
    d = e_q - e
    count = torch.full_like(e[:, 0], e.shape[1])
    return torch.stack([count, *(x.sum(1) for x in (e, d, e * e, d * e, d * d))]).cpu()


def _pooled(
    sums: Mapping[tuple[float, int], Sums], pairs: Mapping[tuple[float, int], int]
) -> Iterator[tuple[float, int, list[Sums]]]:
    """(mean timestep, pairs, sums of both halves) of neighbouring timesteps; the last ones join those before them."""
    groups: list[list[float]] = [[]]
    for timestep in sorted({timestep for timestep, _ in sums}):
        if _enough(groups[-1], pairs):
            groups.append([])
        groups[-1].append(timestep)
    if len(groups) > 1 and not _enough(groups[-1], pairs):
        last = groups.pop()
        groups[-1] += last
    nothing = torch.zeros_like(next(iter(sums.values())))
    for group in groups:
        counts = [sum(pairs.get((timestep, half), 0) for half in HALVES) for timestep in group]
        timestep = sum(t * n for t, n in zip(group, counts, strict=True)) / sum(counts)
        halves = [sum((sums.get((t, half), nothing) for t in group), nothing) for half in HALVES]
        yield timestep, sum(counts), halves


def _enough(timesteps: Sequence[float], pairs: Mapping[tuple[float, int], int]) -> bool:
    return all(sum(pairs.get((t, half), 0) for t in timesteps) >= LEAST_PAIRS for half in HALVES)


def _step(timestep: float, pairs: int, halves: Sequence[Sums]) -> Step:
    """Fit every kind on either half, judge it by the other, and fit the best on both."""
    before = sum(float(half[_DD].sum()) for half in halves)
    after = {kind: 0.0 for kind in KINDS}
    for kind in KINDS:
        for mine, other in (halves, halves[::-1]):
            after[kind] += _left_over(*_fit(kind, mine), other)
    kind = min(KINDS, key=lambda name: after[name])  # the first where several are equal: "none"
    k, mean = _fit(kind, halves[0] + halves[1])
    if k <= -1:  # either half alone was above; what divides by 1 + k must be too
        kind = min(KINDS[:2], key=lambda name: after[name])
        k, mean = _fit(kind, halves[0] + halves[1])
    return Step(timestep, pairs, kind, after[kind] / before if before else 1.0, k, mean)


def _fit(kind: str, sums: Sums) -> tuple[float, torch.Tensor]:
    """k and the mean [C] of one kind; nothing is corrected from no samples."""
    count = sums[_COUNT].clamp(min=1)
    k = 0.0
    if kind == "k and mean":
        covariance = (sums[_DE] - sums[_D] * sums[_E] / count).sum()
        variance = (sums[_EE] - sums[_E].square() / count).sum()
        k = float(covariance / variance) if variance > 0 else 0.0
    return k, torch.zeros_like(count) if kind == "none" else (sums[_D] - k * sums[_E]) / count


def _left_over(k: float, mean: torch.Tensor, sums: Sums) -> float:
    """The sum of squares of (e_q - mean) / (1 + k) - e = (d - mean - k e) / (1 + k)."""
    if k <= -1:
        return math.inf
    count, e, d, ee, de, dd = sums
    squares = dd + count * mean**2 + k**2 * ee - 2 * mean * d - 2 * k * de + 2 * k * mean * e
    return float(squares.sum()) / (1 + k) ** 2


def _save(path: Path, seen: _Seen) -> None:
    keys = list(seen.sums)
    notes = {
        "keys": keys,
        "pairs": [seen.pairs[key] for key in keys],
        "shape": seen.shape,
        "batches": seen.batches,
    }
    tensors = {str(i): seen.sums[key] for i, key in enumerate(keys)}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"output_correction": json.dumps(notes)})


def _load(path: Path) -> _Seen:
    try:
        with safe_open(path, "pt") as file:
            notes = json.loads(file.metadata()["output_correction"])
            keys = [(float(timestep), int(half)) for timestep, half in notes["keys"]]
            sums = {key: file.get_tensor(str(i)) for i, key in enumerate(keys)}
            pairs = dict(zip(keys, notes["pairs"], strict=True))
            return _Seen(sums, pairs, tuple(notes["shape"]), int(notes["batches"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise OctavoError(f"{path}: not readable; delete it and start again") from error

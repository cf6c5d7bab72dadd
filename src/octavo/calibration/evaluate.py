"""Evaluate a network on calibration pairs, for the hooks on it: on no more rows at once than were denoised at once."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import chain, islice

from torch import nn

from octavo.calibration.collect import PairStore
from octavo.diffusion import CalibrationPair, call_arguments, collate, fits_with


def evaluate(denoiser: nn.Module, batches: Iterable[Sequence[CalibrationPair]], *, every: int = 1) -> None:
    """Evaluate `denoiser` on each batch of pairs, `rows_at_once`; of all these evaluations only every n-th.

    What it returns is dropped. Its mode, and whether gradients are kept, are the caller's.
    """
    for rows in islice(chain.from_iterable(map(rows_at_once, batches)), 0, None, every):
        evaluate_rows(denoiser, rows)


def evaluate_rows(denoiser: nn.Module, rows: Sequence[CalibrationPair]) -> None:
    """Evaluate `denoiser` once, on all of `rows` together. What it returns is dropped."""
    device = next(chain(denoiser.parameters(), denoiser.buffers())).device
    denoiser(**call_arguments(denoiser, collate(rows, device)))


def rows_at_once(pairs: Sequence[CalibrationPair]) -> Iterator[Sequence[CalibrationPair]]:
    """Several pairs of one trajectory make a batch longer than what was denoised; here it has that length again.

    Pairs that do not fit into one batch are apart: sequential guidance calls the network with prompts of two lengths.
    """
    at_once = len({pair.image for pair in pairs})
    alike: dict[Hashable, list[CalibrationPair]] = {}
    for pair in pairs:
        alike.setdefault(fits_with(pair), []).append(pair)
    return (
        group[first : first + at_once] for group in alike.values() for first in range(0, len(group), at_once)
    )


def evaluations(pairs: PairStore) -> int:
    """Evaluations that a pass over the pairs takes, counted on its first batch."""
    return len(pairs) * sum(1 for _ in rows_at_once(pairs.load(0)))

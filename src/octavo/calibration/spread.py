"""A few pairs of many, spread over what was collected, in evaluations of pairs that fit together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch

from octavo.calibration.collect import PairStore
from octavo.calibration.evaluate import rows_at_once
from octavo.diffusion import CalibrationPair
from octavo.diffusion.pairs import TIMESTEP_NAMES, WITHOUT_ROWS, map_leaves

Pairs = list[CalibrationPair]


def spread(pairs: PairStore, wanted: int) -> list[Pairs]:
    """`wanted` pairs (or all), spread over the batches and the places in them: one item for each evaluation.

    Of B batches n = min(wanted, B) are read, those in the middle of n equal parts, and from each as many pairs, or one
    more, in the middle of equal parts again and one place on from batch to batch. So neither the noisy nor the clean
    end is preferred, however batches are sorted and few pairs are wanted. No evaluation has more pairs than were
    denoised at once.

    Pairs of several batches share an evaluation where all that they hold is rows of one shape, and numbers that are the
    same. A call may also hold what fits its whole batch alone: a list with an entry for each image, a tensor of rows x
    frames. Of such a batch slices of `rows_at_once` are taken, whole: then there may be more pairs than `wanted`.
    """
    slices = -(-wanted // len(_slices(pairs.load(0))[0]))
    count = min(slices, len(pairs))
    chosen: list[list[Sequence[CalibrationPair]]] = []
    at_once, missing = 1, 0
    for k in reversed(range(count)):  # the last batch may be a shorter one, for which the others make up
        batch = pairs.load(((2 * k + 1) * len(pairs) - 1) // (2 * count))
        at_once = max(at_once, len(next(iter(rows_at_once(batch)))))
        own = _slices(batch)
        due = slices * (k + 1) // count - slices * k // count + missing
        each = min(due, len(own))
        missing = due - each
        chosen.append([own[((2 * j + 1) * len(own) // (2 * each) + k) % len(own)] for j in range(each)])
    return _joined(chain.from_iterable(reversed(chosen)), at_once)


def _joined(slices: Iterable[Sequence[CalibrationPair]], at_once: int) -> list[Pairs]:
    """Neighbours of one form in one evaluation, of at most so many pairs."""
    evaluations: list[Pairs] = []
    before: dict[str, Any] | None = None
    for one in slices:
        form = _form(one[0])
        if form is not None and form == before and len(evaluations[-1]) < at_once:
            evaluations[-1] += one
        else:
            evaluations.append(list(one))
        before = form
    return evaluations


def _slices(batch: Sequence[CalibrationPair]) -> list[Sequence[CalibrationPair]]:
    """What of a batch may be evaluated without its rest: single pairs, or slices as long as the batch was."""
    if _form(batch[0]) is None:
        return list(rows_at_once(batch))
    return [[pair] for pair in batch]


def _form(pair: CalibrationPair) -> dict[str, Any] | None:
    """What pairs must have in common to be evaluated together; None if something may have its batch's length.

    >>> rows = {"sample": torch.ones(1, 3), "timestep": 9, "scale": torch.tensor(2.0)}
    >>> _form(CalibrationPair(rows, frozenset({"sample"}), 1, 0, 0, 2))
    {'sample': ((3,), torch.float32), 'scale': 2.0}
    >>> _form(CalibrationPair({**rows, "shapes": [(1, 4, 4)]}, frozenset({"sample"}), 1, 0, 0, 2))
    """
    form: dict[str, Any] = {}
    of_whole_batch: list[str] = []

    def note(path: str, value: Any) -> None:
        if path in TIMESTEP_NAMES:
            return  # `collate` makes rows of it, whatever each pair has it in
        if path in pair.per_row:
            form[path] = (tuple(value.shape[1:]), value.dtype)
        elif path in WITHOUT_ROWS and torch.is_tensor(value):
            form[path] = (tuple(value.shape), value.flatten().tolist())
        elif value is None:
            form[path] = None
        elif any(part.isdigit() for part in path.split(".")) or (torch.is_tensor(value) and value.ndim):
            of_whole_batch.append(path)
        else:
            form[path] = value.item() if torch.is_tensor(value) else value

    map_leaves(pair.args, note)
    return None if of_whole_batch else form

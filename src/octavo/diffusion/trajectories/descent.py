"""A trajectory improved timestep by timestep, by whatever score is wanted: for what is no sum over jumps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from octavo.diffusion.trajectories.trajectory import check_timesteps
from octavo.errors import OctavoError

Timesteps = tuple[int, ...]
SHRINK = 0.5


@dataclass(frozen=True)
class Descent:
    """Where a descent ended: the timesteps, their score, and every score that was asked for, in order."""

    timesteps: Timesteps
    score: float
    scores: dict[Timesteps, float]


def descend(
    score: Callable[[Timesteps], float],
    starts: Sequence[Timesteps],
    num_train_timesteps: int,
    *,
    max_scores: int,
    smallest_move: int = 8,
    lowest: int = 0,
) -> Descent:
    """Lower `score` by moving one timestep at a time, from the best of `starts`, until no move helps.

    Each timestep in turn is moved towards either neighbour by half of the way between them, then by a quarter, and so
    on while that is at least `smallest_move` timesteps; a move that lowers the score is kept at once. The noisiest
    timestep's upper neighbour is T - 1 itself, the last one's lower neighbour `lowest`. A local minimum of the score,
    not the optimum. Ends after `max_scores` scores; none is asked for twice. The same scores give the same result.

    Raises `OctavoError` without a start, for timesteps that are none or end below `lowest`, or `max_scores`
    below the number of starts.

    >>> descend(lambda t: abs(t[0] - 700) + abs(t[1] - 100), [(900, 450)], 1000, max_scores=50).timesteps
    (696, 98)
    """
    starts = list(dict.fromkeys(tuple(start) for start in starts))
    if not starts:
        raise OctavoError("starts: there is none; give at least one trajectory")
    for start in starts:
        check_timesteps(start, num_train_timesteps)
        if start[-1] < lowest:
            raise OctavoError(f"starts: one ends at timestep {start[-1]}, which is below {lowest}")
    if max_scores < len(starts):
        raise OctavoError(
            f"max_scores: {max_scores} are fewer than the {len(starts)} trajectories to start from"
        )
    scores: dict[Timesteps, float] = {start: score(start) for start in starts}
    best = min(scores, key=lambda timesteps: scores[timesteps])

    fraction = SHRINK
    while True:
        moved, smaller = False, False
        for index in range(len(best)):
            for direction in (1, -1):
                length = int(fraction * _way(best, index, direction, lowest, num_train_timesteps))
                if length < smallest_move:
                    continue
                smaller = True
                candidate = (*best[:index], best[index] + direction * length, *best[index + 1 :])
                if candidate in scores:
                    continue
                if len(scores) >= max_scores:
                    return Descent(best, scores[best], scores)
                scores[candidate] = score(candidate)
                if scores[candidate] < scores[best]:
                    best, moved = candidate, True
                    break
        if not moved:
            if not smaller:
                return Descent(best, scores[best], scores)
            fraction *= SHRINK


def _way(timesteps: Timesteps, index: int, direction: int, lowest: int, num_train_timesteps: int) -> int:
    """How far timestep `index` is from what bounds it on the noisy side (1) or on the clean side (-1)."""
    if direction > 0:
        return (timesteps[index - 1] if index else num_train_timesteps) - timesteps[index]
    return timesteps[index] - (timesteps[index + 1] if index + 1 < len(timesteps) else lowest - 1)

from __future__ import annotations

import pytest

from octavo.diffusion.trajectories.descent import descend
from octavo.errors import OctavoError

Timesteps = tuple[int, ...]


def distance_to(goal: Timesteps) -> object:
    return lambda timesteps: float(sum(abs(t - g) for t, g in zip(timesteps, goal, strict=True)))


def test_what_has_one_minimum_is_found_to_the_smallest_move() -> None:
    goal = (900, 620, 300, 140, 20)
    found = descend(distance_to(goal), [(800, 600, 400, 200, 0)], 1000, max_scores=500, smallest_move=4)  # type: ignore[arg-type]
    assert all(abs(t - g) <= 8 for t, g in zip(found.timesteps, goal, strict=True))
    assert found.score == found.scores[found.timesteps] == min(found.scores.values())


def test_it_begins_at_the_best_start_and_asks_for_none_twice() -> None:
    asked: list[Timesteps] = []

    def score(timesteps: Timesteps) -> float:
        asked.append(timesteps)
        return distance_to((500, 100))(timesteps)  # type: ignore[operator]

    starts = [(999, 998), (520, 90), (999, 998)]
    found = descend(score, starts, 1000, max_scores=40)
    assert asked[:2] == [(999, 998), (520, 90)] and len(asked) == len(set(asked)) == len(found.scores)
    assert found.score <= 30
    assert list(found.scores) == asked


def test_every_candidate_is_a_trajectory() -> None:
    found = descend(lambda t: sum(t) * 1.0, [(3, 1), (999, 0)], 1000, max_scores=60, smallest_move=1)
    assert found.timesteps == (1, 0)
    for timesteps in found.scores:
        assert 999 >= timesteps[0] > timesteps[1] >= 0


def test_no_move_goes_below_the_lowest() -> None:
    found = descend(lambda t: sum(t) * 1.0, [(40, 3)], 1000, max_scores=90, smallest_move=1, lowest=1)
    assert found.timesteps == (2, 1) and min(t[-1] for t in found.scores) == 1
    with pytest.raises(OctavoError, match="starts: one ends at timestep 0, which is below 1"):
        descend(sum, [(40, 0)], 1000, max_scores=9, lowest=1)


def test_it_ends_with_its_scores() -> None:
    found = descend(distance_to((10, 5)), [(999, 500), (900, 300)], 1000, max_scores=5)  # type: ignore[arg-type]
    assert len(found.scores) == 5 and found.score == min(found.scores.values())


def test_bad_arguments_are_told() -> None:
    with pytest.raises(OctavoError, match="starts: there is none"):
        descend(lambda t: 0.0, [], 1000, max_scores=5)
    with pytest.raises(OctavoError, match="max_scores: 1 are fewer than the 2"):
        descend(lambda t: 0.0, [(5,), (6,)], 1000, max_scores=1)
    with pytest.raises(OctavoError, match="do not descend"):
        descend(lambda t: 0.0, [(5, 6)], 1000, max_scores=5)

"""Mutations of saved folders, four of each kind; `python tests/support/mutations.py` makes thousands."""

from __future__ import annotations

import os
from pathlib import Path

import mutations
import pytest
from damage import MUTATIONS
from mutations import Bench, Verdict

SEEDS = range(4 * len(MUTATIONS))


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Verdict]]:
    bench = Bench(tmp_path_factory.mktemp("mutations"))
    return {seed: bench.run(seed) for seed in SEEDS}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_mutated_folder_loads_right_or_is_refused_in_one_line(
    verdicts: dict[int, list[Verdict]], seed: int
) -> None:
    for verdict in verdicts[seed]:
        assert verdict.outcome in ("right", "refused"), verdict


def test_what_no_loading_should_do_is_seen(verdicts: dict[int, list[Verdict]], tmp_path: Path) -> None:
    """Else "right" would say nothing of what is opened, written or run."""
    hostname = Path("/etc/hostname").read_text
    for act in ((tmp_path / "a").touch, (lambda: os.system("true")), hostname, (tmp_path / "b").mkdir):
        with mutations._bounded():
            act()
        assert mutations.EVENTS.pop() and not mutations.EVENTS


def test_the_judge_sees_both_outcomes_and_every_kind(verdicts: dict[int, list[Verdict]]) -> None:
    """Else it would prove nothing: some mutations do no harm, most are refused, some pass for signed."""
    every = [verdict for of_seed in verdicts.values() for verdict in of_seed]
    assert {verdict.outcome for verdict in every} == {"right", "refused"}
    assert {verdict.kind for verdict in every} == {mutate.__name__ for mutate in MUTATIONS}
    assert any(verdict.signed for verdict in every)

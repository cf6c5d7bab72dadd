from __future__ import annotations

import pytest

from octavo.study.tune_spending import Spending


def test_what_was_at_hand_is_counted_but_not_waited_for() -> None:
    spending = Spending({"search": 10, "scores": 100})
    with spending.stage("search", 10, "search") as advance:
        advance(10)
    with spending.stage("scores", 40, "known"):
        pass
    assert spending.counts == {"search": 10, "scores": 40}
    assert (spending.made, spending.left) == (10, 60)
    spending.expect(20)
    assert spending.left == 20
    spending.close()
    assert spending.left == 0


def test_a_stage_that_fails_is_not_counted() -> None:
    spending = Spending({"scores": 100})
    with pytest.raises(KeyError), spending.stage("scores", 40, "fails") as advance:
        advance(8)
        raise KeyError
    assert spending.counts == {"scores": 0} and spending.left == 92


def test_the_bar_says_what_is_made_of_how_much_and_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    spending = Spending({"search": 10, "scores": 90}, progress=True, notes=["left out: pndm"])
    with spending.stage("search", 10, "search") as advance:
        advance(10)
    spending._bar.refresh()
    err = capsys.readouterr().err
    first, second = err.splitlines()[:2]
    assert first == (
        "tune: at most 100 evaluations of the network, one for each image: 10 for searched timesteps, 90 for scores"
    )
    assert second == "left out: pndm"
    assert "10/100 [" in err and "evaluation/s" in err
    spending.close()

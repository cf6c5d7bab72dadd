"""What `make test` leaves out is still there, and every promise keeps a case in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from more import MORE

ROOT = Path(__file__).resolve().parents[1]


def test_names_are_those_of_tests_and_promises_keep_a_case(
    collected: frozenset[str], pytestconfig: pytest.Config
) -> None:
    if set(pytestconfig.args) != set(pytestconfig.getini("testpaths")):
        pytest.skip("only some of the tests are collected")
    within = {case.removeprefix("tests/") for case in collected}
    assert not [name for name in MORE if not any(case.startswith(name) for case in within)]
    kept = [case for case in within if not case.startswith(tuple(MORE))]
    promised = re.findall(r"`tests/(\S+?::\w+)`", (ROOT / "docs" / "promises.md").read_text())
    assert len(promised) > 50
    whole = {case.partition("[")[0] for case in kept}
    assert not [name for name in promised if name not in whole]

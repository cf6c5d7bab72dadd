"""What `make test` leaves out is still there, and every promise keeps a case in it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from more import MORE

ROOT = Path(__file__).resolve().parents[1]


def test_names_are_those_of_tests_and_promises_keep_a_case(
    collected: frozenset[str], pytestconfig: pytest.Config
) -> None:
    of_all = set(pytestconfig.args) == set(pytestconfig.getini("testpaths"))
    if not of_all or pytestconfig.option.lf or pytestconfig.option.ignore:
        pytest.skip("only some of the tests are collected")
    within = {case.removeprefix("tests/") for case in collected}
    files = {case.partition("::")[0] for case in within}  # without an extra, some have no tests

    def is_lost(name: str, cases: Iterable[str]) -> bool:
        file = name.partition("::")[0]
        assert (ROOT / "tests" / file).is_file(), name
        return file in files and not any(case.startswith(name) for case in cases)

    assert not [name for name in MORE if is_lost(name, within)]
    kept = [case for case in within if not case.startswith(tuple(MORE))]
    promised = re.findall(r"`tests/(\S+?::\w+)`", (ROOT / "docs" / "promises.md").read_text())
    assert len(promised) > 50
    whole = {case.partition("[")[0] for case in kept}
    assert not [name for name in promised if is_lost(name, whole)]

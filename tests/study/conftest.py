"""A study small enough for tests: a tiny random pipeline, few images, torch in place of compiled graphs."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo.calibration import trace
from octavo.quantization import ranges
from octavo.study import Sampler, StudyOptions, workbench
from octavo.study.workbench import Workbench


@pytest.fixture
def options() -> StudyOptions:
    return StudyOptions(
        tables=("T2",),
        seeds=2,
        num_images=8,
        steps=4,
        samplers=(Sampler("ddim", 4), Sampler("ddpm", 5)),
        samples=8,
        pairs_per_trajectory=2,
        low_bits=(),
        features="digits",
        batch_size=8,
        permutations=20,
    )


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled: torch simulates, which for so small a network is quicker. Ranges are searched coarsely."""
    monkeypatch.setattr(ranges, "CANDIDATES", 5)
    monkeypatch.setattr(workbench, "execute", lambda pipeline, *rest: (pipeline, "simulation (torch)"))


@pytest.fixture
def bench(pipeline, options, tmp_path: Path, by_torch: None) -> Workbench:  # type: ignore[no-untyped-def]
    return Workbench(pipeline, trace(pipeline), options, tmp_path / "work", tmp_path / "references", "tiny")

"""The cells of the study on disk: one JSON file for each variant and calibration seed, whole or absent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from octavo.errors import OctavoError
from octavo.files import read_json, write_json
from octavo.study.tables import Table
from octavo.study.variants import Variant, digest

FORMAT = 1
"""Raised when a change of what a cell measures makes stored ones stale."""


@dataclass(frozen=True)
class Cell:
    """One measurement: a variant, calibrated with one seed. Rows of several tables may share it."""

    variant: Variant
    seed: int


@dataclass(frozen=True)
class CellStore:
    """Measured cells in `folder`, named by everything that decides them; `setting` is what all cells share (JSON)."""

    folder: Path
    setting: dict[str, Any]

    def path(self, cell: Cell) -> Path:
        name = digest(FORMAT, self.setting, cell.variant.to_dict(), cell.seed)
        return self.folder / f"{cell.variant.slug}-seed{cell.seed}-{name}.json"

    def load(self, cell: Cell) -> dict[str, Any] | None:
        """What was measured, or None. Raises `OctavoError` for a damaged file."""
        path = self.path(cell)
        if not path.is_file():
            return None
        measured = read_json(path)
        if not isinstance(measured, dict) or not isinstance(measured.get("figures"), dict):
            raise OctavoError(
                f"{path}: is not a measured cell; delete it, and the same command measures it again"
            )
        return measured

    def save(self, cell: Cell, measured: dict[str, Any]) -> None:
        write_json(self.path(cell), {"seed": cell.seed, "variant": cell.variant.to_dict(), **measured})


def plan_cells(tables: Sequence[Table], seeds: int) -> list[Cell]:
    """Every cell of the tables, each once: seed by seed, and within a seed those of the same trajectories together.

    A study that is stopped early therefore has whole tables of fewer seeds.
    """
    variants: dict[str, Variant] = {}
    for table in tables:
        for row in table.rows:
            if row.variant is not None:
                variants.setdefault(digest(row.variant.to_dict()), row.variant)
    order: dict[str, int] = {}
    for variant in variants.values():
        order.setdefault(trajectories_of(variant), len(order))
    ordered = sorted(variants.values(), key=lambda variant: (order[trajectories_of(variant)], variant.source))
    return [Cell(variant, seed) for seed in range(seeds) for variant in ordered]


def trajectories_of(variant: Variant) -> str:
    """The same for variants whose calibration trajectories are the same."""
    return digest(variant.trajectories())


def by_trajectories(cells: Sequence[Cell]) -> Iterator[list[Cell]]:
    """Runs of neighbouring cells that share their calibration trajectories."""
    for _, group in groupby(cells, key=lambda cell: (cell.seed, trajectories_of(cell.variant))):
        yield list(group)

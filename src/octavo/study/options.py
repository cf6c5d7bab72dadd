"""How much of the study to run: tables, calibration seeds, images, bit widths, samplers."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from octavo.errors import OctavoError
from octavo.study.samplers import Sampler

TABLES = ("T1", "T2", "T3", "T4", "T5")
BITS = (8, 8)


@dataclass(frozen=True)
class StudyOptions:
    """Everything that decides a study, besides the model and its inputs.

    tables          of "T1" .. "T5".
    seeds           calibration seeds of each cell: independent trajectories, independent draws of timesteps.
    num_images      images sampled for each cell, from the seeds `image_seed` + k: the same noise in every cell.
    sampler, steps  of every table but T5: "ddim", or "own" for the pipeline's scheduler.
    samplers        the rows of T5.
    samples         calibration pairs, `pairs_per_trajectory` from each denoising run.
    single          T3's single timesteps, as fractions of T.
    low_bits        (weight bits, activation bits) at which `low_bit_tables` are run again. T5 is not among them by
                    default: its long samplers would take as long as all other tables.
    features        of the distances: "digits", "inception" or a path (see `octavo.evaluation.features`); "auto" is
                    digits for 16x16 grey images, else inception.
    permutations    of each cell's test whether quantized and full precision differ.

    Raises `OctavoError` for a value out of range.
    """

    tables: tuple[str, ...] = TABLES
    seeds: int = 3
    num_images: int = 128
    sampler: str = "ddim"
    steps: int = 50
    samplers: tuple[Sampler, ...] = (
        Sampler("ddim", 50),
        Sampler("ddim", 100),
        Sampler("ddim", 250),
        Sampler("ddpm", 1000),
    )
    samples: int = 256
    pairs_per_trajectory: int = 4
    single: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    low_bits: tuple[tuple[int, int], ...] = ((8, 6), (6, 6), (4, 8))
    low_bit_tables: tuple[str, ...] = ("T1", "T2", "T3", "T4")
    batch_size: int = 32
    features: str = "auto"
    image_seed: int = 0
    permutations: int = 200

    def __post_init__(self) -> None:
        for name, low in {
            "seeds": 1,
            "num_images": 8,
            "steps": 1,
            "samples": 1,
            "pairs_per_trajectory": 1,
            "batch_size": 1,
            "image_seed": 0,
            "permutations": 1,
        }.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise OctavoError(f"{name}: {value!r} is not a whole number of at least {low}")
        for name in ("tables", "low_bit_tables"):
            for table in getattr(self, name):
                if table not in TABLES:
                    raise OctavoError(f"{name}: {table!r} is not one of {', '.join(TABLES)}")
        if not self.tables:
            raise OctavoError(f"tables: choose one or more of {', '.join(TABLES)}")

    @property
    def base_sampler(self) -> Sampler:
        return Sampler(self.sampler, self.steps)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe, every field; samplers by their names."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            **values,
            "tables": list(self.tables),
            "samplers": [str(sampler) for sampler in self.samplers],
            "single": list(self.single),
            "low_bits": [list(bits) for bits in self.low_bits],
            "low_bit_tables": list(self.low_bit_tables),
        }


QUICK = StudyOptions(
    seeds=2,
    num_images=64,
    steps=20,
    samplers=(Sampler("ddim", 20), Sampler("ddim", 50)),
    samples=64,
    single=(0.0, 0.4, 1.0),
    low_bits=((6, 6),),
    low_bit_tables=("T3",),
)
"""A first look: two seeds, fewer images and steps, no DDPM, one lower bit width. Intervals are wide."""

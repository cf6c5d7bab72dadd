"""What `octavo tune` is asked for, and what it tries: the goal, the choices, how much is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from octavo.calibration.recipes import RECIPES
from octavo.diffusion.trajectories import SPACINGS
from octavo.errors import OctavoError, check_choice
from octavo.evaluation.trajectory_methods import SearchOptions
from octavo.study.tune_networks import DP, FLOAT
from octavo.study.tune_quality import METRICS

REFERENCE = "reference"
LADDER = (3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50)


@dataclass(frozen=True)
class Goal:
    """What is wanted: the fastest that is so good, or the best that is so fast.

    kind   "quality" or "latency".
    value  for quality the largest FD or the least PSNR in dB, None for the reference's own FD; for latency the seconds
           an image may take.

    >>> Goal.of("quality=8.5"), Goal.of("latency=0.2"), Goal.of("quality=reference").value
    (Goal(kind='quality', value=8.5), Goal(kind='latency', value=0.2), None)
    """

    kind: str
    value: float | None

    @classmethod
    def of(cls, text: str) -> Goal:
        """Raises `OctavoError` for what is neither quality=NUMBER, quality=reference nor latency=SECONDS."""
        kind, _, value = text.partition("=")
        if (kind, value) == ("quality", REFERENCE):
            return cls(kind, None)
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if kind not in ("quality", "latency") or not math.isfinite(number) or number <= 0:
            raise OctavoError(
                f"target: {text!r} is not quality=NUMBER, quality={REFERENCE} or latency=SECONDS"
            )
        return cls(kind, number)


@dataclass(frozen=True)
class TuneOptions:
    """What is tried, and how much is measured.

    recipes, solvers, spacings, steps   every combination is a choice; a solver that the pipeline cannot drive is none.
                     "ddim:0.5" among the solvers is DDIM with that eta, which the winner's folder holds.
    metric           "fd" (to real data, which it needs) or "psnr" (to the images of the reference from the same noise;
                     only samplers that add no noise are tried).
    num_images       images of each score; verify_images: of the winner's and the reference's last comparison.
    reference_steps  of the full-precision pipeline in its own solver; for psnr in DDIM where its own adds noise.
    search           what the dynamic programming of the spacing "dp" may cost.

    Raises `OctavoError` for a name that there is not, or a number out of range.
    """

    recipes: tuple[str, ...] = ("best", FLOAT)
    solvers: tuple[str, ...] = ("ddim", "dpmsolver++", "unipc")
    spacings: tuple[str, ...] = (DP, "trailing", "quadratic", "karras")
    steps: tuple[int, ...] = LADDER
    metric: str = "fd"
    num_images: int = 512
    verify_images: int = 1024
    reference_steps: int = 100
    search: SearchOptions = field(default_factory=SearchOptions)

    def __post_init__(self) -> None:
        check_choice("metric", self.metric, METRICS)
        for name in ("recipes", "solvers", "spacings", "steps"):
            if not getattr(self, name):
                raise OctavoError(f"{name}: is empty; give at least one")
        for recipe in self.recipes:
            check_choice("recipes", recipe, (*RECIPES, FLOAT))
        for spacing in self.spacings:
            check_choice("spacings", spacing, (DP, *SPACINGS))
        for steps in (*self.steps, self.reference_steps):
            if type(steps) is not int or steps < 1:
                raise OctavoError(f"steps: {steps!r} is not a whole number from 1")
        for name in ("num_images", "verify_images"):
            if getattr(self, name) < 8:
                raise OctavoError(f"{name}: {getattr(self, name)} is not at least 8")

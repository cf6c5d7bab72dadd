"""One way to quantize, and a name for it: what a cell of a table measures."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from octavo.calibration import PTQ4DM
from octavo.calibration.recipe import bits_in_order
from octavo.errors import OctavoError
from octavo.study.samplers import Sampler

SOURCES = ("denoising", "forward", "raw", "noise")


@dataclass(frozen=True)
class Variant:
    """A recipe, the sampler it is calibrated and sampled with, and where its calibration samples come from.

    source   "denoising": what the sampler hands to its network (the method). The others keep its timesteps and put
             another sample there: "forward" q(x_t | x_0), "raw" x_0, "noise" x_T.
    network  False: the layers stay in float, only the recipe's operations are quantized.
    """

    sampler: Sampler
    recipe: PTQ4DM
    source: str = "denoising"
    network: bool = True

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise OctavoError(f"source: {self.source!r} is not one of {', '.join(SOURCES)}")
        if self.recipe.steps != self.sampler.steps:
            raise OctavoError(f"recipe: its {self.recipe.steps} steps are not those of {self.sampler}")

    def trajectories(self) -> dict[str, Any]:
        """What decides which calibration trajectories are run, and where they are caught (JSON)."""
        recipe = self.recipe
        return {
            "sampler": str(self.sampler),
            "timesteps": recipe.distribution.to_dict(),
            "samples": recipe.samples,
            "pairs_per_trajectory": recipe.pairs_per_trajectory,
        }

    def to_dict(self) -> dict[str, Any]:
        """All that decides the variant (JSON)."""
        return {
            "sampler": str(self.sampler),
            "source": self.source,
            "network": self.network,
            "recipe": self.recipe.to_dict(),
        }

    @property
    def slug(self) -> str:
        """A name for people; not unique.

        >>> Variant(Sampler("ddim", 50), PTQ4DM(steps=50), source="raw").slug
        'w8a8-ddim-50-raw-ndtc-mse'
        """
        recipe = self.recipe
        bits = f"w{recipe.weights}a{recipe.activations}" if self.network else f"float-a{recipe.activations}"
        parts = [bits, str(self.sampler).lower(), self.source, recipe.distribution.name, recipe.metric]
        return "-".join(parts).replace("_", "")


def digest(*values: Any) -> str:
    """SHA-256 (first 16 hex digits) of JSON-safe values: the same for equal values, whatever the order of keys.

    But for `bits` of recipes, whose order decides (`bits_in_order`).

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
    True
    """
    return hashlib.sha256(json.dumps(bits_in_order(values), sort_keys=True).encode()).hexdigest()[:16]

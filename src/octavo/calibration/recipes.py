"""Recipes by name: what the measurements in docs/log.md say of the options, as a few composed steps each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.calibration.recipe import PTQ4DM
from octavo.errors import OctavoError

RECIPES: Mapping[str, Mapping[str, Any]] = {
    # the paper's calibration; its own setting adds network_output, sampled_image and one pair of a run
    "ptq4dm": {},
    # + 14 dB on the bundled model, at about the same speed; nearer to full precision than bf16 is
    "best": {
        "sub_pixel": True,
        "balance": True,
        "rounding": "gptq",
        "time_embedding": "weights",
        "float_activations": 0.1,
    },
    # 4-bit weights in int8 kernels, half the size: on the bundled model nearer to full precision than plain 8-bit ones,
    # on the coloured digits 10 dB farther (docs/log.md)
    "w4a8": {"sub_pixel": True, "balance": True, "rounding": "gptq", "weights": 4},
}


def named_recipe(name: str, **changes: Any) -> PTQ4DM:
    """The recipe called `name`, with `changes` of single fields. Raises `OctavoError` if there is none.

    >>> named_recipe("best", samples=64).rounding
    'gptq'
    """
    if name not in RECIPES:
        raise OctavoError(f"recipe: {name!r} is not one of {', '.join(RECIPES)}")
    return PTQ4DM(**{**RECIPES[name], **changes})

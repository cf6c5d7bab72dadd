"""The bits of each layer in a file: written for one model, and put into a recipe for that model alone"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from octavo.calibration import PTQ4DM
from octavo.errors import OctavoError, quoted
from octavo.files import read_json, write_json
from octavo.quantization import FLOAT as FLOAT_BITS
from octavo.work import digest_value

FORMAT = 1
FLOAT = "float"
LayerBits = tuple[int, int] | None
"""(weight bits, activation bits), or None for float. 32 activation bits: integers for the weights alone."""


def weights_name(denoiser: nn.Module) -> str:
    """SHA-256 (first 32 hex digits) of the network's tensors, their names and types; library versions do not count."""
    digest = hashlib.sha256()
    digest_value(digest, dict(denoiser.state_dict()), "weights")
    return digest.hexdigest()[:32]


def write_bits(
    path: str | os.PathLike[str], denoiser: nn.Module, layers: Mapping[str, LayerBits], **notes: Any
) -> None:
    """Write layer name -> bits for `denoiser` as JSON, with `notes` for people."""
    described = {name: FLOAT if bits is None else list(bits) for name, bits in layers.items()}
    write_json(path, {"format": FORMAT, "weights": weights_name(denoiser), "layers": described, **notes})


def with_bits(recipe: PTQ4DM, path: str | os.PathLike[str], denoiser: nn.Module) -> PTQ4DM:
    """`recipe` with the file's bits for the layers that it names; all else of the recipe stays.

    Float layers become `exclude` patterns, the others `bits` patterns that win over those of the recipe: exact names,
    with fnmatch's special characters escaped. Raises `OctavoError` for a file that is none, or is of another network.
    """
    found = read_json(path)
    if (
        not isinstance(found, dict)
        or found.get("format") != FORMAT
        or not isinstance(found.get("layers"), dict)
    ):
        raise OctavoError(
            f"{path}: is not a file of bits; `octavo sensitivity MODEL --budget ...` writes one"
        )
    layers = {name: _read(path, name, bits) for name, bits in found["layers"].items()}
    if found.get("weights") != weights_name(denoiser):
        raise OctavoError(f"{path}: was made for another model; run `octavo sensitivity` on this one")
    return with_layer_bits(recipe, layers)


def other_fields(recipe: PTQ4DM, path: str | os.PathLike[str]) -> list[str]:
    """Where `recipe` is another than the one that the file's bits were chosen under; none if the file does not tell.

    The ranking and the budget are of that one. Which layers are quantized, and at how many bits, is left out.
    """
    chosen_under = read_json(path).get("recipe")
    if not isinstance(chosen_under, dict):
        return []
    given = recipe.to_dict()
    return [
        name
        for name in given
        if name not in ("include", "exclude", "bits")
        and name in chosen_under
        and chosen_under[name] != given[name]
    ]


def with_layer_bits(recipe: PTQ4DM, layers: Mapping[str, LayerBits]) -> PTQ4DM:
    """`recipe` with these bits for these layers.

    >>> changed = with_layer_bits(PTQ4DM(), {"a[0]": None, "b.c": (4, 8)})
    >>> changed.exclude, dict(changed.bits)
    (('a[[]0]',), {'b.c': (4, 8)})
    """
    floats = tuple(glob.escape(name) for name, bits in layers.items() if bits is None)
    exact = {glob.escape(name): bits for name, bits in layers.items() if bits is not None}
    others = {pattern: bits for pattern, bits in recipe.bits.items() if pattern not in exact}
    return replace(recipe, exclude=(*recipe.exclude, *floats), bits={**others, **exact})


def _read(path: Any, name: str, bits: Any) -> LayerBits:
    if bits == FLOAT:
        return None
    if (
        isinstance(bits, list)
        and len(bits) == 2
        and all(type(value) is int for value in bits)
        and 2 <= bits[0] <= 8
        and (2 <= bits[1] <= 8 or bits[1] == FLOAT_BITS)
    ):
        return bits[0], bits[1]
    raise OctavoError(
        f"{path}: {name}: {quoted(bits)} is neither {FLOAT!r} nor [weight bits, activation bits]: 2 to 8 each, or "
        f"{FLOAT_BITS} (float) activation bits"
    )

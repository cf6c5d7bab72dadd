"""Whether Octavo quantized what is in a folder, found before a link out of the folder is followed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from octavo.checkpoint.config import QuantMethod
from octavo.checkpoint.headers import read_header
from octavo.checkpoint.strict import check_contents, open_plain, places_of, read_plain, stays_in
from octavo.errors import OctavoError

CONFIG, MODEL_CARD = "config.json", "README.md"
OWN_TAG = "\n- octavo\n"
"""In the model card that Octavo writes."""
MOST_CARD = 1 << 20


def is_octavos(folder: Path) -> bool:
    """Whether Octavo quantized the component in `folder`, as its `config.json` says, or else its tensors do.

    Without the second, a configuration that lost its `quantization_config` would have diffusers take random numbers for
    the weights that it misses, and only warn. Files that lie in the folder are asked first. Raises `OctavoError` if one
    of them says so and a link leads out.
    """
    if _tells(folder, places_of(folder)):
        check_contents(folder)
        return True
    return _tells(folder, None)


def octavos_components(folder: Path) -> list[Path]:
    """The folders of the components that Octavo quantized, in a pipeline's folder.

    What lies in the folder is asked first, its model card too. Raises `OctavoError` if it says that Octavo wrote the
    folder and a link leads out. Only where nothing in it says so are links followed, for others may have had reasons
    for them.
    """
    parts = sorted(folder.iterdir()) if folder.is_dir() else []
    places = places_of(folder)
    inside = [part for part in parts if stays_in(part, places) and part.is_dir()]
    if _has_card(folder) or any(_tells(part, places) for part in inside):
        check_contents(folder)
    return [part for part in parts if part.is_dir() and is_octavos(part)]


def quantization_in(folder: Path) -> Mapping[str, Any]:
    """The `quantization_config` of a component as diffusers reads it; empty where there is none that can be read."""
    try:
        found = read_plain(folder / CONFIG)["quantization_config"]
    except (OctavoError, TypeError, KeyError):
        return {}
    return found if isinstance(found, Mapping) else {}


def _tells(folder: Path, places: list[Path] | None) -> bool:
    """Whether a file of the component says that it is Octavo's; of those alone that stay in `places`, if given."""

    def asked(path: Path) -> bool:
        return places is None or stays_in(path, places)

    if asked(folder / CONFIG) and quantization_in(folder).get("quant_method") == QuantMethod.OCTAVO:
        return True
    for path in filter(asked, folder.glob("*.safetensors")):
        with suppress(OctavoError):
            names = read_header(path)
            if any(
                f"{name.rpartition('.')[0]}.input_zero_point" in names for name in names if _is_integer(name)
            ):
                return True
    return False


def _is_integer(name: str) -> bool:
    return name.endswith((".weight_int8", ".weight_int4"))


def _has_card(folder: Path) -> bool:
    card = folder / MODEL_CARD
    if not stays_in(card, places_of(folder)):
        return False
    try:
        with open_plain(card) as file:
            return OWN_TAG in file.read(MOST_CARD).decode("utf-8", errors="replace")
    except (OctavoError, OSError):
        return False

"""A saved folder, checked before anything is built from it: what it lists, what it configures, what its files hold.

Every fault is one line that names the file and the key. Nothing is allocated for what a file merely announces, and no
link out of the folder is followed. The digests tell damage, not malice: who can write the folder can write those too,
so whatever they cover is checked as if there were none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from octavo.checkpoint.config import OctavoConfig, QuantMethod, read_files
from octavo.checkpoint.headers import Stored, read_header
from octavo.checkpoint.seals import (
    PICKLES,
    check_no_pickles,
    check_nothing_else,
    check_seals,
    digest_of_network,
)
from octavo.checkpoint.strict import check_contents, check_name, read_strict
from octavo.checkpoint.whose import CONFIG, octavos_components, quantization_in
from octavo.errors import OctavoError, quoted
from octavo.files import read_json
from octavo.named import INDEX, check_model

LIBRARIES = ("diffusers", "transformers", "octavo")
LARGEST = 1 << 20
"""Of every whole number in a network's configuration: channels, classes, timesteps."""
SQUARED = ("sample_size", "max_size")
LARGEST_SQUARED = 4096
"""Of numbers whose names end so, for tables of positions grow with their square."""
LONGEST = 4096
"""Of every list in it."""
REPEATING = ("layers", "blocks", "depth", "num_res")
"""Parts of the names of numbers that say how often something is built; each takes a stored tensor at least."""


def check_pipeline(folder: Path) -> None:
    """Raise `OctavoError` unless `folder` is a pipeline's and what it holds is whole and safe to read."""
    check_model(str(folder))
    index = folder / INDEX
    own = octavos_components(folder)
    if own:
        check_files(folder, own)
    components = read_strict(index)
    if not isinstance(components, dict) or not isinstance(components.get("_class_name"), str):
        raise OctavoError(f"{index}: names no pipeline class (_class_name)")
    for component, place in components.items():
        if component.startswith("_") or not isinstance(place, list) or place in ([None, None], []):
            continue
        check_name(component, str(index))
        _check_component(folder / component, index, place, bool(own))
    for part in own:
        if components.get(part.name) in (None, [], [None, None]):
            raise OctavoError(
                f"{index}: does not name {part.name}, which is quantized; save or download the model again"
            )


def check_files(folder: Path, own: list[Path]) -> None:
    """Raise `OctavoError` unless the files of a pipeline, whose `own` components are Octavo's, are those it saved."""
    check_contents(folder)
    check_no_pickles(folder)
    for part in own:
        check_nothing_else(folder, _seals(part))


def check_quantized(folder: Path) -> None:
    """Raise `OctavoError` unless the quantized network in `folder` is what Octavo saved, as far as files can tell.

    Of the tensors themselves only headers are read; their values are checked, and their digest, as they are loaded.
    """
    check_contents(folder)
    check_no_pickles(folder)
    path = folder / CONFIG
    config = read_strict(path)
    found = config.get("quantization_config") if isinstance(config, dict) else None
    method = found.get("quant_method") if isinstance(found, dict) else None
    if not isinstance(found, dict) or method != QuantMethod.OCTAVO:
        raise OctavoError(
            f"{path}: quantization_config: quant_method is {quoted(method)}, but the weights are Octavo's; save or "
            "download the model again"
        )
    try:
        quantization = OctavoConfig.from_dict(found)
    except OctavoError as error:
        raise OctavoError(f"{path}: {error}") from error
    digest = quantization.digest.get("network")
    if digest is not None and digest != digest_of_network(config):
        raise OctavoError(
            f"{path}: is not what Octavo saved (digest differs); save or download the model again"
        )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise OctavoError(f"{folder}: has no weights in safetensors; save or download the model again")
    stored = {name: tensor for file in files for name, tensor in read_header(file).items()}
    network = {key: value for key, value in config.items() if key != "quantization_config"}
    check_sizes(str(path), network, len(stored))
    check_layers(str(folder), quantization, stored)
    for index in folder.glob("*.index.json"):
        _check_shards(index)
    if (folder.parent / INDEX).is_file():
        check_seals(folder.parent, quantization.files)


def check_sizes(where: str, value: Any, tensors: int, key: str = "") -> None:
    """Raise `OctavoError` for numbers that no network of that many stored tensors has: they would be built for hours.

    >>> check_sizes("config.json", {"num_layers": 10**6}, tensors=200)
    Traceback (most recent call last):
        ...
    octavo.errors.OctavoError: config.json: num_layers: 1000000 is more than the checkpoint can fill (200); ...
    """
    if isinstance(value, Mapping):
        for name, item in value.items():
            check_sizes(where, item, tensors, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        if len(value) > LONGEST:
            raise OctavoError(
                f"{where}: {key[:200]}: is a list of {len(value):,}; save or download the model again"
            )
        for item in value:
            check_sizes(where, item, tensors, key)
    elif type(value) in (int, float):
        most = LARGEST
        if any(part in key for part in REPEATING):
            most = tensors
        elif key.endswith(SQUARED):
            most = LARGEST_SQUARED
        if abs(value) > most:
            raise OctavoError(
                f"{where}: {key[:200]}: {value} is more than the checkpoint can fill ({most}); save or download the "
                "model again"
            )


def check_layers(where: str, config: OctavoConfig, stored: Mapping[str, Stored]) -> None:
    """Raise `OctavoError` unless each quantized layer's integers and scales are stored, and fit together."""
    for name, rule in config.layers.items():
        integers = f"{name}.{'weight_int4' if rule.weights.bits <= 4 else 'weight_int8'}"
        for key in (integers, f"{name}.weight_scale", f"{name}.input_scale", f"{name}.input_zero_point"):
            if key not in stored:
                raise OctavoError(
                    f"{where}: {key[:200]}: missing from the checkpoint; save or download it again"
                )
        channels, scales = stored[integers].shape[:1], stored[f"{name}.weight_scale"].shape
        if not channels or scales != channels:
            raise OctavoError(
                f"{where}: {name[:200]}.weight_scale: is {list(scales)} for {list(channels)} output channels; save or "
                "download the model again"
            )


def _check_component(folder: Path, index: Path, place: list[Any], strictly: bool) -> None:
    """Whatever wrote it; what Octavo wrote more strictly than what others may have had reasons for."""
    if len(place) != 2 or (place[0] not in LIBRARIES and not _is_pipeline_module(place[0])):
        raise OctavoError(
            f"{index}: {folder.name} comes from {quoted(place[0])}, which Octavo does not import"
        )
    if not isinstance(place[1], str) or not place[1].isidentifier():
        raise OctavoError(f"{index}: {folder.name} is of class {quoted(place[1])}, which is no name")
    if not folder.is_dir():
        raise OctavoError(f"{folder}: is missing from the pipeline; save or download the model again")
    for path in _files(folder):
        if path.suffix == ".json":
            read_strict(path, infinities=True) if strictly else read_json(path)
    weights = [path for path in _files(folder) if path.suffix in (".safetensors", *PICKLES)]
    if weights and not any(path.suffix == ".safetensors" for path in weights):
        raise OctavoError(f"{weights[0]}: pickled weights can run code; convert them to safetensors")
    for path in _files(folder):
        if strictly and path.name.endswith(".json") and ".index." in path.name:
            _check_shards(path)
    for path in weights:
        if path.suffix == ".safetensors":
            read_header(path) if strictly else _check_opens(path)


def _check_opens(path: Path) -> None:
    """The header must parse and the file must be as long as it says: a truncated download is told here."""
    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise OctavoError(f"{path}: damaged or truncated ({error}); save or download it again") from error


def _check_shards(index: Path) -> None:
    """Every tensor is in the file that the index says."""
    listed = read_strict(index)
    weight_map = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(weight_map, dict) or not isinstance(listed.get("metadata"), dict):
        raise OctavoError(f"{index}: has no weight_map and metadata; save or download the model again")
    headers: dict[str, Mapping[str, Stored]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise OctavoError(f"{index}: {name[:200]}: names no file; save or download the model again")
        check_name(file, str(index))
        if not file.endswith(".safetensors"):  # by which the libraries tell it from a pickle
            raise OctavoError(
                f"{index}: {name[:200]}: is in {quoted(file)}, which is no safetensors file; save or download the "
                "model again"
            )
        if file not in headers:
            headers[file] = read_header(index.parent / file)
        if name not in headers[file]:
            raise OctavoError(f"{index}: {name[:200]}: is not in {file}; save or download the model again")


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.is_file())


def _seals(folder: Path) -> Mapping[str, str]:
    """The seals that the component in `folder` keeps; empty where there are none that can be read."""
    files = quantization_in(folder).get("files", {})
    try:
        return read_files(files if isinstance(files, Mapping) else {})
    except OctavoError as error:
        raise OctavoError(f"{folder / CONFIG}: {error}") from error


def _is_pipeline_module(library: Any) -> bool:
    import diffusers.pipelines

    return isinstance(library, str) and library.isidentifier() and hasattr(diffusers.pipelines, library)

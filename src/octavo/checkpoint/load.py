"""Load any pipeline folder, quantized or not, with one clear line when it cannot be."""

from __future__ import annotations

import importlib.resources
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from octavo.checkpoint.registration import register
from octavo.errors import OctavoError
from octavo.files import read_json

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

BUNDLED = ("digits",)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def load(model: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """Load a pipeline: a local folder, a hub id, or "digits" (bundled).

    Only safetensors and JSON are read and no code from the folder or the hub is run; a folder with pickled weights
    only, or with a pipeline class of its own, is refused. A hub id is what the user names: diffusers looks for it in
    the local cache, then on the hub. Raises `OctavoError`, one line, for whatever is wrong with the model.
    """
    register()
    name = os.fspath(model)
    if name in BUNDLED and not Path(name).is_dir():
        name = str(importlib.resources.files("octavo") / "data" / name)
    if Path(name).exists():
        _check_folder(Path(name))
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(name, dtype=dtype, use_safetensors=True)
    except (OctavoError, Warning):
        raise
    except (
        Exception
    ) as error:  # diffusers and safetensors raise many kinds; each means that the model is unusable
        if not Path(name).exists():
            raise OctavoError(
                f"{model}: is no folder here, and no pipeline of that name came from the hub "
                f"({type(error).__name__}); check the name and the network"
            ) from error
        raise OctavoError(f"{model}: cannot be loaded: {_first_line(error)}{_mend(error)}") from error


def _check_folder(folder: Path) -> None:
    """Read the JSON that will be trusted, before anything is built from it."""
    if folder.is_file():
        raise OctavoError(f"{folder}: is a file; give the folder of a diffusers pipeline")
    index = folder / "model_index.json"
    if not index.is_file():
        raise OctavoError(f"{folder}: has no model_index.json, so it is not a diffusers pipeline folder")
    components = read_json(index)
    if not isinstance(components, dict) or not isinstance(components.get("_class_name"), str):
        raise OctavoError(f"{index}: names no pipeline class (_class_name)")
    for component, place in components.items():
        if component.startswith("_") or not isinstance(place, list) or place in ([None, None], []):
            continue
        _check_component(folder / component, index, place)


def _check_component(folder: Path, index: Path, place: list[Any]) -> None:
    if len(place) != 2 or (
        place[0] not in ("diffusers", "transformers", "octavo") and not _is_pipeline_module(place[0])
    ):
        raise OctavoError(f"{index}: {folder.name} comes from {place[0]!r}, which Octavo does not import")
    if not folder.is_dir():
        raise OctavoError(f"{folder}: is missing from the pipeline; save or download the model again")
    for path in (*folder.glob("*.json"),):
        read_json(path)
    weights = [path for path in folder.iterdir() if path.suffix in (".safetensors", *PICKLES)]
    if weights and not any(path.suffix == ".safetensors" for path in weights):
        raise OctavoError(f"{weights[0]}: pickled weights can run code; convert them to safetensors")
    for path in folder.glob("*.safetensors"):
        _check_safetensors(path)


def _is_pipeline_module(library: Any) -> bool:
    import diffusers.pipelines

    return isinstance(library, str) and hasattr(diffusers.pipelines, library)


def _check_safetensors(path: Path) -> None:
    """The header must parse and the file must be as long as it says: a truncated download is told here."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise OctavoError(f"{path}: damaged or truncated ({error}); save or download it again") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _mend(error: BaseException) -> str:
    return "" if "quantiz" in str(error) else "; check the name, or save or download the model again"

"""Load any pipeline folder, quantized or not, with one clear line when it cannot be."""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from octavo.checkpoint.check import check_pipeline
from octavo.checkpoint.registration import first_line, register
from octavo.errors import OctavoError
from octavo.named import BUNDLED, check_model

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def load(model: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """Load a pipeline: a local folder, a hub id, or "digits" (bundled).

    Only safetensors and JSON are read and no code from the folder or the hub is run; a folder with pickled weights
    only, or with a pipeline class of its own, is refused. A hub id is what the user names: diffusers looks for it in
    the local cache, then on the hub. Raises `OctavoError`, one line, for whatever is wrong with the model.
    """
    if not isinstance(dtype, torch.dtype):
        raise OctavoError(f"dtype: {dtype!r} is no torch.dtype; give torch.bfloat16, say")
    register()
    name = os.fspath(model)
    if name in BUNDLED and not Path(name).is_dir():
        name = str(importlib.resources.files("octavo") / "data" / name)
    check_model(name)
    if Path(name).is_dir():
        check_pipeline(Path(name))
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
        raise OctavoError(f"{model}: cannot be loaded: {first_line(error)}{_mend(error)}") from error


def _mend(error: BaseException) -> str:
    return "" if "quantiz" in str(error) else "; check the name, or save or download the model again"

"""The headers of safetensors files, checked before anything is allocated for what they announce."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from octavo.checkpoint.strict import open_plain, parse_strict
from octavo.errors import OctavoError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""What Octavo and the pipelines that it quantizes store."""
MOST_HEADER = 100_000_000
"""Bytes; the safetensors library's own limit."""


@dataclass(frozen=True)
class Stored:
    """A tensor as its header announces it."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, Stored]:
    """Tensor name -> dtype and shape. Reads the header alone.

    The tensors must fill the rest of the file without gap or overlap, so none is larger than the file. Raises
    `OctavoError`, which names the file and the tensor, for whatever is not so. Format:
    https://github.com/huggingface/safetensors, "Format".
    """
    try:
        with open_plain(path) as file:
            length = os.fstat(file.fileno()).st_size
            size = int.from_bytes(file.read(8), "little")
            if length < 8 or size > min(length - 8, MOST_HEADER):
                raise _damaged(path, f"its header of {size:,} bytes is longer than the file")
            text = file.read(size).decode("utf-8")
    except OSError as error:
        raise OctavoError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise _damaged(path, "its header is not UTF-8") from error
    header = parse_strict(text, f"{path}: damaged or truncated: its header")
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no JSON object")
    header.pop("__metadata__", None)
    found, spans = {}, []
    for name, entry in header.items():
        found[name], span = _read_entry(path, name, entry)
        spans.append((*span, name))
    end = 0
    for first, last, name in sorted(spans):
        if first != end:
            raise _damaged(path, f"{name[:200]} begins at byte {first:,} of the data, not {end:,}")
        end = last
    if end != length - 8 - size:
        raise _damaged(path, f"it holds {length - 8 - size:,} bytes of tensors, not {end:,}")
    return found


def _read_entry(path: Path, name: str, entry: Any) -> tuple[Stored, tuple[int, int]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"{name[:200]} has no dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise _damaged(path, f"{name[:200]} is of dtype {str(entry['dtype'])[:20]!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise _damaged(path, f"{name[:200]} has a shape or data_offsets that are no sizes")
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise _damaged(path, f"{name[:200]} does not have as many bytes as its shape and dtype say")
    return Stored(dtype, tuple(shape)), (offsets[0], offsets[1])


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _damaged(path: Path, what: str) -> OctavoError:
    return OctavoError(f"{path}: damaged or truncated: {what}; save or download the model again")


def check_fits(where: str, stored: Mapping[str, Stored], expected: Mapping[str, torch.Tensor]) -> None:
    """Raise `OctavoError` unless each of the `stored` tensors has the shape, and the kind of number, that is expected.

    `expected`: what the network that the configuration describes holds, on the meta device. Integers must be of that
    very dtype; floats may be of another width where the network was saved in it.
    """
    for name, tensor in expected.items():
        if name not in stored:
            continue
        found = stored[name]
        if found.shape != tuple(tensor.shape):
            raise OctavoError(
                f"{where}: {name[:200]}: is {list(found.shape)}, not {list(tensor.shape)}; save or download the "
                "model again"
            )
        if found.dtype != tensor.dtype and not (
            found.dtype.is_floating_point and tensor.dtype.is_floating_point
        ):
            raise OctavoError(
                f"{where}: {name[:200]}: is {found.dtype}, not {tensor.dtype}; save or download the model again"
            )

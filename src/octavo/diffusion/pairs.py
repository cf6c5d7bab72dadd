"""What the network was handed at one step of one image: kept, saved, and put back into batches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.errors import OctavoError

# The names diffusers' networks give the argument that tells them the training timestep.
TIMESTEP_NAMES = ("timestep", "timesteps", "t")
# Positions that FLUX hands over once for the whole batch: no rows of it, even where there are as many of both.
WITHOUT_ROWS = ("img_ids", "txt_ids")


@dataclass(frozen=True, eq=False)
class CalibrationPair:
    """One call of the denoiser, as it concerned one image.

    args       by the forward's parameter names: the image's rows of every tensor as long as the batch, copied
               to the CPU bit for bit; other tensors whole (a 0-d timestep); other values as they were. Dicts,
               lists and tuples are kept, e.g. `added_cond_kwargs`.
    per_row    dotted paths into args, as "added_cond_kwargs.text_embeds", of the tensors cut into rows.
    num_rows   rows the image has in the call: 1, or 2 with batched guidance.
    image      which image of the whole run.
    step       sampler iterations made before this call, counted from 0 at the noisy end.
    steps_left T - step: T at the first call, 1 at the last.
    """

    args: dict[str, Any]
    per_row: frozenset[str]
    num_rows: int
    image: int
    step: int
    steps_left: int


def map_leaves(value: Any, function: Callable[[str, Any], Any], path: str = "") -> Any:
    """`value` with `function(path, leaf)` in place of each leaf; dicts, lists and tuples are rebuilt.

    >>> map_leaves({"a": [1, 2]}, lambda path, leaf: (path, leaf))
    {'a': [('a.0', 1), ('a.1', 2)]}
    """
    below = f"{path}." if path else ""
    if isinstance(value, Mapping):
        return {key: map_leaves(item, function, f"{below}{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [map_leaves(item, function, f"{below}{i}") for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    return function(path, value)


def flatten(pair: CalibrationPair) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A pair as tensors by path (for safetensors) and a JSON-safe description of the rest.

    Raises OctavoError, naming the parameter, for a value that is neither a tensor nor JSON-safe.

    >>> args = {"sample": torch.zeros(1, 2), "timestep": 7}
    >>> pair = CalibrationPair(args, frozenset({"sample"}), num_rows=1, image=0, step=0, steps_left=5)
    >>> tensors, description = flatten(pair)
    >>> list(tensors), unflatten(tensors, description).args["timestep"]
    (['sample'], 7)
    """
    tensors: dict[str, Tensor] = {}
    description = {
        "args": _describe(pair.args, tensors, ""),
        "per_row": sorted(pair.per_row),
        "num_rows": pair.num_rows,
        "image": pair.image,
        "step": pair.step,
        "steps_left": pair.steps_left,
    }
    return tensors, description


def unflatten(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> CalibrationPair:
    """The inverse of `flatten`, bit for bit. Raises OctavoError if a tensor or a field is missing."""
    try:
        fields = {**description, "per_row": frozenset(description["per_row"])}
        return CalibrationPair(**{**fields, "args": _restore(description["args"], tensors)})
    except (KeyError, TypeError, IndexError) as error:
        raise OctavoError(f"calibration pair: description and tensors do not fit ({error!r})") from error


def collate(pairs: Sequence[CalibrationPair], device: torch.device | str | None = None) -> dict[str, Any]:
    """One batch for the denoiser: `denoiser(**collate(pairs))` evaluates every pair, in order.

    Tensors per row are concatenated to [rows, ...]; the timestep becomes [rows], whatever form each pair has
    it in, since one batch may mix timesteps; all else must be the same in every pair. Raises OctavoError
    naming the parameter that is not.

    >>> cut = frozenset({"sample"})
    >>> early = CalibrationPair({"sample": torch.ones(1, 3), "timestep": 9}, cut, 1, 0, 0, 2)
    >>> late = CalibrationPair({"sample": torch.zeros(2, 3), "timestep": 4}, cut, 2, 1, 1, 1)
    >>> batch = collate([early, late])
    >>> batch["sample"].shape, batch["timestep"]
    (torch.Size([3, 3]), tensor([9, 4, 4]))
    """
    if not pairs:
        raise OctavoError("pairs: there is none to collate")
    flat = [_leaves(pair) for pair in pairs]
    for pair, leaves in zip(pairs, flat, strict=True):
        for odd in sorted(leaves.keys() ^ flat[0].keys()):
            raise OctavoError(f"pairs: {odd} is in some of the pairs only; collate them apart")
        for odd in sorted((pair.per_row ^ pairs[0].per_row).difference(TIMESTEP_NAMES)):
            raise OctavoError(f"pairs: {odd} is cut into rows in some of the pairs only; collate them apart")

    def join(path: str, _: Any) -> Any:
        values = [leaves[path] for leaves in flat]
        if path in TIMESTEP_NAMES:
            joined = torch.cat(
                [_timestep_rows(value, pair.num_rows) for value, pair in zip(values, pairs, strict=True)]
            )
        elif path in pairs[0].per_row:
            joined = _concatenate(path, values)
        else:
            joined = _common(path, values)
        return joined.to(device) if torch.is_tensor(joined) and device is not None else joined

    batch: dict[str, Any] = map_leaves(pairs[0].args, join)
    return batch


def fits_with(pair: CalibrationPair) -> Hashable:
    """What `collate` wants pairs to have in common: equal for two pairs that fit into one batch.

    >>> cut = frozenset({"text"})
    >>> long, short = (CalibrationPair({"text": torch.ones(1, n, 3)}, cut, 1, 0, 0, 2) for n in (5, 2))
    >>> fits_with(long) == fits_with(short), fits_with(long) == fits_with(long)
    (False, True)
    """
    common: list[Hashable] = []

    def note(path: str, value: Any) -> None:
        if path in TIMESTEP_NAMES:
            common.append(path)
        elif path in pair.per_row:
            common.append((path, "rows", value.shape[1:]))
        elif torch.is_tensor(value):
            content = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            common.append((path, value.dtype, value.shape, hash(content)))
        else:
            common.append((path, type(value), repr(value)))

    map_leaves(pair.args, note)
    return tuple(common)


def _leaves(pair: CalibrationPair) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    map_leaves(pair.args, leaves.__setitem__)
    return leaves


def _timestep_rows(value: Any, num_rows: int) -> Tensor:
    timestep = torch.as_tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    return timestep.expand(num_rows) if timestep.numel() == 1 else timestep


def _concatenate(path: str, values: list[Any]) -> Tensor:
    shapes = {value.shape[1:] for value in values}
    if len(shapes) > 1:
        raise OctavoError(f"pairs: {path} has rows of {len(shapes)} shapes; collate them apart")
    return torch.cat(values)


def _common(path: str, values: list[Any]) -> Any:
    first = values[0]
    for value in values[1:]:
        if type(value) is not type(first) or not (
            torch.equal(value, first) if torch.is_tensor(first) else value == first
        ):
            raise OctavoError(f"pairs: {path} is not the same in every pair; collate them apart")
    return first


def _describe(value: Any, tensors: dict[str, Tensor], path: str) -> dict[str, Any]:
    below = f"{path}." if path else ""
    if torch.is_tensor(value):
        tensors[path] = value.contiguous()
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"dict": {key: _describe(item, tensors, f"{below}{key}") for key, item in value.items()}}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_describe(item, tensors, f"{below}{i}") for i, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise OctavoError(f"calibration pair: {path} is a {type(value).__name__}, which cannot be stored")


def _restore(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    ((kind, content),) = described.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _restore(item, tensors) for key, item in content.items()}
    if kind in ("list", "tuple"):
        items = [_restore(item, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    if kind == "value":
        return content
    raise KeyError(kind)

"""JSON and paths of a folder that somebody else may have written: read strictly, and nothing outside of it."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from octavo.errors import OctavoError, quoted

MOST_BYTES = 64 << 20
"""Of one JSON file: the largest tokenizers have a third of it."""
MOST_LEVELS = 32
"""Of objects and lists in each other."""


def read_strict(path: Path, *, infinities: bool = False) -> Any:
    """The JSON value in `path`: no key twice, no NaN, at most `MOST_LEVELS` deep and `MOST_BYTES` long.

    `infinities` are let through where asked for: diffusers writes them into schedulers' configurations. Raises
    `OctavoError` that names the file, and the key where there is one.
    """
    text = _text(path)
    return parse_strict(text, str(path), infinities=infinities)


def read_plain(path: Path) -> Any:
    """The JSON value in `path` as diffusers reads it, whatever it repeats. Raises `OctavoError` if there is none."""
    text = _text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OctavoError(f"{path}: is not JSON ({error}); save or download the model again") from error


def _text(path: Path) -> str:
    try:
        with open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MOST_BYTES:
                raise OctavoError(
                    f"{path}: {size:,} bytes are no configuration; save or download the model again"
                )
            text = file.read().decode("utf-8")
    except OSError as error:
        raise OctavoError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise OctavoError(
            f"{path}: is not UTF-8 ({error.reason}); save or download the model again"
        ) from error
    return text


def open_plain(path: Path) -> BinaryIO:
    """`path` opened for reading, if it is a plain file: opening a pipe would wait for whoever writes to it.

    Raises `OctavoError` for pipes, devices and folders, `OSError` as `open` does.
    """
    if stat.S_ISREG(path.stat().st_mode):  # opening a device may do something already
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        if stat.S_ISREG(os.fstat(file).st_mode):
            return open(file, "rb")
        os.close(file)
    raise OctavoError(f"{path}: is no plain file; save or download the model again")


def parse_strict(text: str, where: str, *, infinities: bool = False) -> Any:
    """`read_strict` of a text; `where` names it in errors.

    >>> parse_strict('{"a": [1, 2.5]}', "note")
    {'a': [1, 2.5]}
    >>> parse_strict('{"a": 1, "a": 2}', "note")
    Traceback (most recent call last):
        ...
    octavo.errors.OctavoError: note: has the key 'a' twice; save or download the model again
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            names = [key for key, _ in items]
            twice = next(key for key in names if names.count(key) > 1)
            raise OctavoError(f"{where}: has the key {quoted(twice)} twice; save or download the model again")
        return found

    def number(token: str) -> float:
        value = float(token)
        if math.isnan(value) or (math.isinf(value) and not infinities):
            raise OctavoError(
                f"{where}: holds {token[:20]}, which is no number; save or download the model again"
            )
        return value

    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=number, parse_float=number)
        deep = _levels(value)
    except OctavoError:
        raise
    except RecursionError:
        deep = MOST_LEVELS + 1
    except ValueError as error:
        raise OctavoError(f"{where}: is not JSON ({error}); save or download the model again") from error
    if deep > MOST_LEVELS:
        raise OctavoError(
            f"{where}: is nested more than {MOST_LEVELS} levels deep; save or download the model again"
        )
    return value


def _levels(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max((_levels(item) for item in inner), default=0) if isinstance(value, (dict, list)) else 0


def places_of(folder: Path) -> list[Path]:
    """Where the files of `folder` may lie: in it, or, in the Hub's cache, among the snapshot's blobs."""
    places = [folder.resolve()]
    for above in (folder, *folder.parents[:1]):  # a component's folder has its pipeline's around it
        if above.parent.name == "snapshots":
            places.append((above.parent.parent / "blobs").resolve())
    return places


def stays_in(path: Path, places: list[Path]) -> bool:
    """Whether `path`, its links followed, lies in one of `places`. Nothing is opened."""
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # links in a circle; which of the two, Python's version decides
        return False
    return any(target.is_relative_to(place) for place in places)


def check_contents(folder: Path) -> None:
    """Raise `OctavoError` unless all in `folder` are folders and plain files that lie in it.

    A link may lead elsewhere in the folder, or, in the Hub's cache, to the blobs that belong to the snapshot. Pipes and
    devices, which may never end, are refused.
    """
    places = places_of(folder)
    for path in _walk(folder):
        try:
            target = path.resolve()
        except (
            OSError,
            RuntimeError,
        ) as error:  # links in a circle; which of the two, Python's version decides
            raise OctavoError(f"{path}: is a link to itself; save or download the model again") from error
        if not any(target.is_relative_to(place) for place in places):
            raise OctavoError(
                f"{path}: leads out of the folder, to {target}; save or download the model again"
            )
        mode = _mode(path)
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise OctavoError(f"{path}: is neither a file nor a folder; save or download the model again")


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError as error:
        raise OctavoError(f"{path}: cannot be read ({error.strerror or error})") from error


def _walk(folder: Path) -> Iterator[Path]:
    """Everything below `folder`; links are not followed."""
    for place, folders, files in os.walk(folder):
        yield from (Path(place) / name for name in (*folders, *files))


def check_name(name: str, where: str) -> None:
    """Raise `OctavoError` unless `name` is that of one entry of a folder.

    >>> check_name("unet", "model_index.json")
    >>> check_name("../unet", "model_index.json")
    Traceback (most recent call last):
        ...
    octavo.errors.OctavoError: model_index.json: '../unet' is a path, not a name; save or download the model again
    """
    if (
        not 0 < len(name) < 256
        or name in (".", "..")
        or "/" in name
        or "\\" in name
        or "\0" in name
        or ":" in name
    ):
        raise OctavoError(f"{where}: {quoted(name)} is a path, not a name; save or download the model again")

"""Files that are either whole or absent, and the folder for what can be computed again."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from octavo.errors import OctavoError

UNFINISHED = ".unfinished"


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; once the block ends without an error it takes `path`'s place.

    The block writes a file at the temporary path, or makes a folder there. A file takes the place of a file
    in one step (`os.replace`), so a reader sees the old one or the new one; a folder that exists already is
    moved aside first. When the block raises, `path` stays as it was and the temporary is removed. Parent
    folders are made. The temporary keeps the suffix of `path`, because some writers choose their format by
    it. Raises `OctavoError` when `path` has no name of its own ("." or "..").

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with atomic_path(folder / "a" / "note.txt") as temporary:
    ...     _ = temporary.write_text("whole")
    >>> (folder / "a" / "note.txt").read_text(), len(list((folder / "a").iterdir()))
    ('whole', 1)
    """
    target = Path(path)
    if target.name in ("", ".."):
        raise OctavoError(f"{path}: is not a name of its own; name a file or folder to write")
    target.parent.mkdir(parents=True, exist_ok=True)
    nest = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=UNFINISHED, dir=target.parent))
    temporary = nest / target.name
    try:
        yield temporary
        if target.is_dir() and temporary.is_dir():
            _swap_folders(temporary, target, nest / f"{target.name}.replaced")
        else:
            os.replace(temporary, target)
    finally:
        shutil.rmtree(nest, ignore_errors=True)


def remove_unfinished(folder: str | os.PathLike[str], older_than: float = 3600.0) -> None:
    """Remove what a killed `atomic_path` left in `folder`, if it is more than `older_than` seconds old.

    For folders that are written to for hours and may be killed often. Younger ones may be another process's, which is
    still writing. A folder that is absent has none.
    """
    for nest in Path(folder).glob(f".*{UNFINISHED}"):
        if nest.stat().st_mtime < time.time() - older_than:
            shutil.rmtree(nest, ignore_errors=True)


def _swap_folders(new: Path, target: Path, aside: Path) -> None:
    """Put `new` in `target`'s place and the old folder `aside`; the old one comes back if that fails."""
    os.replace(target, aside)
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(aside, target)
        raise


def check_place(path: str | os.PathLike[str]) -> None:
    """Raise `OctavoError` if nothing can be written at `path`: no name, or a parent that takes no files.

    For commands that work for minutes before they write. Nothing is left there.
    """
    target = Path(path)
    here = Path.cwd()
    if target.resolve() in (here, *here.parents):
        raise OctavoError(f"{path}: is the folder you are in, or above it; name a file or folder in it")
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OctavoError(f"{path}: {parent} is not a folder; choose another place")
    try:  # an administrator may write anywhere, says `os.access`, also into /proc
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise OctavoError(f"{path}: {parent} may not be written to; choose another place") from error


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `obj` as indented UTF-8 JSON, atomically; keys keep their order, NaN and infinity are refused.

    Raises `OctavoError` when `obj` has something JSON cannot hold.
    """
    try:
        text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise OctavoError(f"{path}: cannot be written as JSON ({error})") from error
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file. Raises `OctavoError` when it is absent, unreadable, truncated or nested without end.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "figures.json"
    >>> write_json(path, {"psnr": 31.5})
    >>> read_json(path)
    {'psnr': 31.5}
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise OctavoError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise OctavoError(f"{path}: is not JSON ({error}); write it again or fetch it again") from error


def cache_folder() -> Path:
    """The folder for what can be computed again (compiled networks): `$OCTAVO_CACHE`, else `~/.cache/octavo`.

    The folder is not created here.
    """
    chosen = os.environ.get("OCTAVO_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "octavo"

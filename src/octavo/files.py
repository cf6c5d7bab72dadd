"""Files that are either whole or absent, and the folder for what can be computed again."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from octavo.errors import OctavoError
from octavo.places import UNCHANGED, tell
from octavo.writers import OWN_NESTS, locked, own_nest, remove_dead


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; once the block ends without an error it takes `path`'s place.

    The block writes a file at the temporary path, or makes a folder there. It takes the place of what was there in one
    step, so a reader, also one after a kill, sees the old one or the new one; of two writers the
    last wins. (A folder on a system that cannot exchange two is moved aside first.) When the block raises, `path` stays
    as it was and the temporary is removed; one that a killed writer left is removed by the next for the same `path`.
    Parent folders are made. The temporary keeps the suffix of `path`, because some writers choose their format by it.

    Raises `OctavoError` when `path` has no name of its own ("." or ".."), or cannot be written: a full disk, say.

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
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_dead(target)
        with own_nest(target) as nest:
            temporary = nest / target.name
            yield temporary
            put(temporary, target)
    except Exception as error:
        tell(error, path, target.parent)
        raise


@contextmanager
def atomic_files(folder: str | os.PathLike[str], names: Sequence[str]) -> Iterator[Path]:
    """Yield a temporary folder for files of these names, which take their places in `folder` together.

    Other files there stay. Once the block ends without an error the old ones are removed, the last of `names` first,
    and the new ones put, the last of them last: after a kill those that are there are of one writer, all of them where
    the last one is. Of two writers the last wins, whole. When the block raises, a full disk say, `folder` stays as it
    was. Raises `OctavoError` as `atomic_path` does.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with atomic_files(folder, ["a.txt", "b.txt"]) as temporary:
    ...     _ = (temporary / "a.txt").write_text("1"), (temporary / "b.txt").write_text("2")
    >>> sorted(os.listdir(folder))
    ['a.txt', 'b.txt']
    """
    seal = Path(folder) / names[-1]
    for name in names:
        if (seal.parent / name).is_dir():
            raise OctavoError(f"{seal.parent / name}: is a folder; name another place for the files")
    removing = False
    try:
        seal.parent.mkdir(parents=True, exist_ok=True)
        remove_dead(seal)
        with own_nest(seal) as nest:
            yield nest
            with locked(seal.parent, wait=True):
                removing = True
                for name in reversed(names):
                    (seal.parent / name).unlink(missing_ok=True)
                for name in names:
                    os.replace(nest / name, seal.parent / name)
    except Exception as error:
        tell(error, seal.parent, seal.parent, "some of what was there may be gone" if removing else UNCHANGED)
        raise


def put(new: Path, target: Path) -> None:
    """Move `new` to `target`, in the place of what is there; a replaced folder ends where `new` was."""
    own = (
        target.parent in OWN_NESTS
    )  # locked already, and nobody else's: a block may write atomically within its own
    with nullcontext() if own else locked(target.parent, wait=True):  # or two would meet half-way
        if not (target.is_dir() and new.is_dir()):
            os.replace(new, target)
        elif not _exchange(new, target):
            _swap_folders(new, target, new.with_name(f"{target.name}.replaced"))


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step, as Linux can (`renameat2`); False where it cannot."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        return int(libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange)) == 0
    except (AttributeError, OSError, TypeError):
        return False


def _swap_folders(new: Path, target: Path, aside: Path) -> None:
    """Put `new` in `target`'s place and the old folder `aside`; the old one comes back if that fails."""
    os.replace(target, aside)
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(aside, target)
        raise


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

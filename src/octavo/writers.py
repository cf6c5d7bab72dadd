"""Who writes at a path: each writer has a folder beside it, locked while that writer lives."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from octavo.errors import OctavoError
from octavo.places import tell

UNFINISHED = ".unfinished"
TAKEN = "{}: another process writes there; wait for it, or choose another place"

OWN_NESTS: set[Path] = set()
"""Those that this process holds."""


@contextmanager
def only_writer(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold `path` while a command works for it, for hours perhaps; what is there meanwhile stays.

    Parent folders are made, and removed at the end if they are empty still. Raises `OctavoError` while another process
    holds `path` or is writing there. One that dies lets go, however it dies; two that begin at the same moment may both
    be told. Where the system has no locks (Windows) nothing is held.
    """
    target = Path(path)
    with ExitStack() as stack:
        for folder in reversed(target.parents):
            if not folder.exists():
                stack.callback(_remove_if_empty, folder)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_dead(target)
            own = stack.enter_context(own_nest(target))
        except OSError as error:
            tell(error, path, target.parent)
            raise
        if any(nest != own and _is_held(nest) for nest in _nests(target)):
            raise OctavoError(TAKEN.format(path))
        yield


@contextmanager
def own_nest(target: Path) -> Iterator[Path]:
    """A folder beside `target`, locked while this process lives and removed at the end."""
    while True:
        made = tempfile.mkdtemp(prefix=f".{target.name}.", suffix=UNFINISHED, dir=target.parent)
        nest = target.parent / Path(made).name  # relative where the target is: Python 3.12 makes it absolute
        with ExitStack() as stack:
            # before it is locked another writer may take it for a dead one's; then the next
            with suppress(FileNotFoundError):
                stack.enter_context(locked(nest, wait=True))
            if not nest.is_dir():
                continue
            stack.callback(shutil.rmtree, nest, ignore_errors=True)
            OWN_NESTS.add(nest)
            stack.callback(OWN_NESTS.discard, nest)
            yield nest
            return


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _nests(target: Path) -> list[Path]:
    """Those of all writers of `target`, living and dead."""
    with os.scandir(target.parent) as entries:
        names = [entry.name for entry in entries if entry.name.endswith(UNFINISHED)]
    length = (
        len(f".{target.name}.") + 8 + len(UNFINISHED)
    )  # of `tempfile`; a nest of "run.1" is none of "run"
    return [
        target.parent / name for name in names if name.startswith(f".{target.name}.") and len(name) == length
    ]


def _is_held(nest: Path) -> bool:
    """Whether a living writer has it; one that is only left there, and may not be removed, is not."""
    try:
        with locked(nest, wait=False):
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False


@contextmanager
def locked(folder: Path, *, wait: bool) -> Iterator[None]:
    """Hold a folder by a lock that dies with the process. Raises `OSError` if it is held and we do not wait.

    Where there are no such locks (Windows) a waiting one holds nothing, and one that does not wait raises.
    """
    try:
        import fcntl
    except ImportError:
        if not wait:
            raise OSError("no locks") from None
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def remove_dead(target: Path) -> None:
    """Remove what killed writers of `target` left."""
    for nest in _nests(target):
        with suppress(OSError), locked(nest, wait=False):
            shutil.rmtree(nest, ignore_errors=True)


def remove_unfinished(folder: str | os.PathLike[str], older_than: float = 3600.0) -> None:
    """Remove what a killed `atomic_path` left in `folder`, whatever it wrote, if more than `older_than` seconds old.

    For folders that are written to for hours and may be killed often. Younger ones may be another process's, which is
    still writing. A folder that is absent has none.
    """
    for nest in Path(folder).glob(f".*{UNFINISHED}"):
        if nest.stat().st_mtime < time.time() - older_than:
            shutil.rmtree(nest, ignore_errors=True)

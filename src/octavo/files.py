"""Files that are either whole or absent, and the folder for what can be computed again."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from octavo.errors import OctavoError

UNFINISHED = ".unfinished"
TAKEN = "{}: another process writes there; wait for it, or choose another place"
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""The system's errors that tell of a place, not of a program: a full disk, a quota, one that may not be written to."""


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
        _remove_dead(target)
        with _nest(target) as nest:
            temporary = nest / target.name
            yield temporary
            put(temporary, target)
    except Exception as error:
        _tell(error, path, target.parent)
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
        _remove_dead(seal)
        with _nest(seal) as nest:
            yield nest
            with _locked(seal.parent, wait=True):
                removing = True
                for name in reversed(names):
                    (seal.parent / name).unlink(missing_ok=True)
                for name in names:
                    os.replace(nest / name, seal.parent / name)
    except Exception as error:
        _tell(
            error, seal.parent, seal.parent, "some of what was there may be gone" if removing else UNCHANGED
        )
        raise


@contextmanager
def only_writer(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold `path` while a command works for it, for hours perhaps; what is there meanwhile stays.

    Raises `OctavoError` while another process holds it or is writing there. One that dies lets go, however it dies;
    two that begin at the same moment may both be told. Where the system has no locks (Windows) nothing is held.
    """
    target = Path(path)
    with ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_dead(target)
            own = stack.enter_context(_nest(target))
        except OSError as error:
            _tell(error, path, target.parent)
            raise
        if any(nest != own and _is_held(nest) for nest in _nests(target)):
            raise OctavoError(TAKEN.format(path))
        yield


_OWN_NESTS: set[Path] = set()
"""Those that this process holds."""


@contextmanager
def _nest(target: Path) -> Iterator[Path]:
    """A folder beside `target`, locked while this process lives and removed at the end."""
    while True:
        nest = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=UNFINISHED, dir=target.parent))
        with ExitStack() as stack:
            # before it is locked another writer may take it for a dead one's; then the next
            with suppress(FileNotFoundError):
                stack.enter_context(_locked(nest, wait=True))
            if not nest.is_dir():
                continue
            stack.callback(shutil.rmtree, nest, ignore_errors=True)
            _OWN_NESTS.add(nest)
            stack.callback(_OWN_NESTS.discard, nest)
            yield nest
            return


def _remove_dead(target: Path) -> None:
    """Remove what killed writers of `target` left."""
    for nest in _nests(target):
        with suppress(OSError), _locked(nest, wait=False):
            shutil.rmtree(nest, ignore_errors=True)


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


@contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[None]:
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


def _is_held(nest: Path) -> bool:
    """Whether a living writer has it; one that is only left there, and may not be removed, is not."""
    try:
        with _locked(nest, wait=False):
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def put(new: Path, target: Path) -> None:
    """Move `new` to `target`, in the place of what is there; a replaced folder ends where `new` was."""
    own = (
        target.parent in _OWN_NESTS
    )  # locked already, and nobody else's: a block may write atomically within its own
    with nullcontext() if own else _locked(target.parent, wait=True):  # or two would meet half-way
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


UNCHANGED = "what was there is unchanged"


def _tell(error: Exception, path: str | os.PathLike[str], folder: Path, state: str = UNCHANGED) -> None:
    """Raise `OctavoError` in one line for an error of the place while `path` in `folder` was written."""
    reason = _why_not_written(error, folder)
    if reason is not None:
        raise OctavoError(
            f"{path}: cannot be written ({reason}); {state}; make room or choose another place"
        ) from error


def _why_not_written(error: BaseException, folder: Path) -> str | None:
    """What the system says, if it is about the place that is written to; None for any other error.

    Libraries wrap it in errors of their own; the number, or the words, are still there.
    """
    named = getattr(error, "filename", None)
    if isinstance(error, OctavoError) or (isinstance(named, str) and not Path(named).is_relative_to(folder)):
        return None
    if isinstance(error, RuntimeError) and "iostream" in str(error):
        return "no space left, or a place that takes no files"  # all that OpenVINO says
    for number in UNWRITABLE:
        words = os.strerror(number)
        told = isinstance(error, OSError) and error.errno == number
        if told or f"os error {number})" in str(error) or words in str(error):
            return words
    return None


def remove_unfinished(folder: str | os.PathLike[str], older_than: float = 3600.0) -> None:
    """Remove what a killed `atomic_path` left in `folder`, whatever it wrote, if more than `older_than` seconds old.

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


def check_file_place(path: str | os.PathLike[str]) -> None:
    """`check_place` for a file: raise `OctavoError` where there is a folder of that name, too."""
    check_place(path)
    if Path(path).is_dir():
        raise OctavoError(f"{path}: is a folder; name a file, in it or elsewhere")


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

"""Places that can be written to, and the one line that says why another cannot."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from octavo.errors import OctavoError

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""The system's errors that tell of a place, not of a program: a full disk, a quota, one that may not be written to."""
UNCHANGED = "what was there is unchanged"


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


def tell(error: Exception, path: str | os.PathLike[str], folder: Path, state: str = UNCHANGED) -> None:
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

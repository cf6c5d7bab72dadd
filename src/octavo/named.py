"""What arguments name, a model or a file; what they cannot be is told without torch."""

from __future__ import annotations

import re
from pathlib import Path

from octavo.errors import OctavoError

BUNDLED = ("digits",)
INDEX = "model_index.json"
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
"""The form of the hub's names, `name` or `owner/name`."""


def check_model(name: str) -> None:
    """Raise `OctavoError` for a file, for a folder that is no pipeline's, and for a path where nothing is.

    A name that the hub may know passes, as may a folder whose contents are wrong: `checkpoint.check` reads those.

    >>> check_model("digits")
    >>> check_model("/nowhere")
    Traceback (most recent call last):
        ...
    octavo.errors.OctavoError: /nowhere: is no folder here; check the path
    """
    folder = Path(name)
    if name in BUNDLED and not folder.is_dir():
        return
    if folder.is_file():
        raise OctavoError(f"{name}: is a file; give the folder of a diffusers pipeline")
    if folder.is_dir():
        if not (folder / INDEX).is_file():
            raise OctavoError(f"{name}: has no {INDEX}, so it is not a diffusers pipeline folder")
    elif not HUB_ID.fullmatch(name):
        raise OctavoError(f"{name}: is no folder here; check the path")


def can_be_read_again(path: Path) -> bool:
    """Whether a look at what is there takes nothing away: of all but pipes and devices.

    Of a path that cannot even be asked for too: who reads it tells why.

    >>> can_be_read_again(Path("/nowhere")), can_be_read_again(Path("/dev/null"))
    (True, False)
    """
    try:
        return not path.exists() or path.is_file() or path.is_dir()
    except OSError:
        return True

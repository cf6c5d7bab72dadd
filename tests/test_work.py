from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from octavo.errors import OctavoError
from octavo.work import digest_value, held


def digest(value: Any) -> str:
    found = hashlib.sha256()
    digest_value(found, value, "inputs")
    return found.hexdigest()


def test_a_held_folder_is_refused_and_free_again_afterwards(tmp_path: Path) -> None:
    refused = pytest.raises(OctavoError, match="taken, wait")
    with held(tmp_path, "first"), refused, held(tmp_path, "taken, wait"):
        pass
    with held(tmp_path, "again"):
        pass


def test_values_are_told_apart_by_kind_and_contents() -> None:
    picture = Image.new("L", (2, 2))
    values: list[Any] = [
        None,
        True,
        1,
        1.0,
        "1",
        [1],
        {"1": 1},
        torch.zeros(2),
        torch.zeros(2, 1),
        torch.zeros(2, dtype=torch.float64),
        torch.tensor([0.0, 1.0]),
        np.zeros(2),
        picture,
        picture.convert("RGB"),
    ]
    assert len({digest(value) for value in values}) == len(values)
    assert digest({"b": 1, "a": torch.zeros(2)}) == digest({"a": torch.zeros(2), "b": 1})


def test_what_has_no_contents_is_named() -> None:
    with pytest.raises(OctavoError, match=r"inputs\.callback: a function"):
        digest({"callback": digest})

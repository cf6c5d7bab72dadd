from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from octavo.checkpoint.headers import DTYPES, Stored, check_fits, read_header
from octavo.errors import OctavoError

GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def _write(path: Path, header: Any, data: bytes = bytes(24)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.zeros(2, 3, dtype=dtype) for dtype in DTYPES.values()}
    save_file({**tensors, "empty": torch.zeros(0)}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "a.safetensors")
    assert found.pop("empty") == Stored(torch.float32, (0,))
    assert found == {name: Stored(tensor.dtype, (2, 3)) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"shape": [2, 4]}, "as many bytes"),
        ({"shape": [2**62, 3]}, "as many bytes"),
        ({"shape": [-2, -3]}, "no sizes"),
        ({"shape": [2.0, 3]}, "no sizes"),
        ({"shape": [1] * 9}, "no sizes"),
        ({"dtype": "F128"}, "dtype"),
        ({"dtype": None}, "dtype"),
        ({"data_offsets": [8, 32]}, "begins at byte 8"),
        ({"data_offsets": [24, 0]}, "as many bytes"),
        ({"data_offsets": [0]}, "no sizes"),
        ({"more": 1}, "no dtype, shape"),
    ],
)
def test_what_a_header_may_not_say(tmp_path: Path, entry: dict[str, Any], told: str) -> None:
    path = _write(tmp_path / "a.safetensors", {"w": {**GOOD, **entry}})
    with pytest.raises(OctavoError, match=rf"a.safetensors: damaged or truncated: .*w.*{told}"):
        read_header(path)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b"\xff\xff",
        b'{"w": 1, "w": 2}',
        b'{"w": NaN}',
        json.dumps({"w": GOOD, "v": GOOD}).encode(),
    ],
)
def test_headers_that_are_none(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(OctavoError, match="damaged or truncated"):
        read_header(_write(tmp_path / "a.safetensors", header))


@pytest.mark.parametrize("data", [bytes(23), bytes(25), b""])
def test_tensors_fill_the_file(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(OctavoError, match="bytes of tensors, not 24"):
        read_header(_write(tmp_path / "a.safetensors", {"w": GOOD}, data))


@pytest.mark.parametrize("size", [2**63, 2**40, 100, 1])
def test_a_header_longer_than_the_file_is_not_read(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(size.to_bytes(8, "little")[: 8 if size > 1 else 3])
    with pytest.raises(OctavoError, match="longer than the file"):
        read_header(path)


def test_integers_are_of_their_dtype_and_floats_of_any_width() -> None:
    expected = {"q": torch.zeros(2, dtype=torch.int8), "w": torch.zeros(3)}
    check_fits("a", {"q": Stored(torch.int8, (2,)), "w": Stored(torch.bfloat16, (3,))}, expected)
    for name, stored in {"q": Stored(torch.uint8, (2,)), "w": Stored(torch.int32, (3,))}.items():
        with pytest.raises(OctavoError, match=f"a: {name}: is"):
            check_fits("a", {name: stored}, expected)
    with pytest.raises(OctavoError, match=r"a: w: is \[4\], not \[3\]"):
        check_fits("a", {"w": Stored(torch.float32, (4,))}, expected)

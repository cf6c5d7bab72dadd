from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.memory import give_back, let_go


def resident(kind: str = "RssAnon") -> int:
    """Bytes of this process's own memory that lie in RAM; "RssFile": of the files that it maps."""
    (line,) = [text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(kind)]
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_lies_between_blocks_in_use_is_given_back() -> None:
    """Blocks of 16 KB: glibc takes them from its heap, and keeps it whole while its last block is in use."""
    blocks = [torch.ones(4096) for _ in range(8192)]
    kept = blocks[::64]
    del blocks
    before = resident()
    give_back()
    assert before - resident() > 64 * 2**20
    assert all(bool((block == 1).all()) for block in kept)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_pages_of_a_file_are_let_go_and_read_again(tmp_path: Path) -> None:
    exact = torch.arange(2**24, dtype=torch.float32)
    save_file({"x": exact, "small": torch.ones(7)}, tmp_path / "weights.safetensors")
    os.sync()  # what is not on the disk yet cannot be let go
    tensors = load_file(tmp_path / "weights.safetensors")
    x = tensors["x"]
    x[5] = -1.0
    assert float(x.sum()) > 0
    if resident("RssShmem") > 48 * 2**20:
        pytest.skip("the temporary folder is kept in memory")
    before = resident("RssFile")
    let_go([x, tensors["small"], torch.ones(2**20)])
    assert before - resident("RssFile") > 48 * 2**20
    assert x[5] == -1.0 and torch.equal(x[6:], exact[6:])

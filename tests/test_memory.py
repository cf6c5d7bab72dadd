from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from octavo.memory import give_back


def resident() -> int:
    """Bytes of this process's own memory that lie in RAM."""
    (line,) = [
        text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("RssAnon")
    ]
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

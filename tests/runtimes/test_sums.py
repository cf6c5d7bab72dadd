from __future__ import annotations

from pathlib import Path

from octavo.runtimes.sums import SUMS, is_intact, write_sums


def test_what_was_done_to_a_file_is_seen(tmp_path: Path) -> None:
    (tmp_path / "graph.bin").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "graph.xml").write_text("<net/>")
    assert not is_intact(tmp_path)  # nothing was written for these
    write_sums(tmp_path)
    assert is_intact(tmp_path)
    contents = (tmp_path / "graph.bin").read_bytes()
    for damaged in (contents[:-1], contents + b"\0", b"", bytes([contents[0] ^ 1]) + contents[1:]):
        (tmp_path / "graph.bin").write_bytes(damaged)
        assert not is_intact(tmp_path)
    (tmp_path / "graph.bin").write_bytes(contents)
    assert is_intact(tmp_path)
    for text in ("", "{", "[]", "\udcff"):
        (tmp_path / SUMS).write_text(text, errors="surrogateescape")
        assert not is_intact(tmp_path)
    assert not is_intact(tmp_path / "absent")

"""The README tells the truth: its file tree names every file, its commands exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_file_tree_is_the_package() -> None:
    files = {
        str(path.relative_to(ROOT / "src/octavo"))
        for path in (ROOT / "src/octavo").rglob("*.py")
        if path.name != "__init__.py"
    }
    tree = README.split("## The house")[1].split("```text")[1].split("```")[0]
    folders: list[str] = []
    listed = set()
    for line in tree.splitlines():
        if match := re.match(r"((?:  )+)(\w+)(/|\.py) +\S", line):
            depth = len(match[1]) // 2 - 1
            folders[depth:] = [match[2]]
            if match[3] == ".py":
                listed.add("/".join(folders) + ".py")
    assert listed == files


def test_make_targets_and_commands_exist() -> None:
    from octavo.cli import app

    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([a-z-]+)", README):
        assert f"\n{target}:" in makefile, target
    commands = {command.name for command in app.registered_commands}
    assert set(re.findall(r"^octavo (\w+)", README, re.MULTILINE)) <= commands


def test_the_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a reader would paste it, with fewer samples."""
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    quick = block.replace("samples=256, steps=50", "samples=8, steps=4")
    assert quick != block
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(quick, names)
    assert type(names["fast"]).__name__ == "DDIMPipeline"
    assert names["fast"](num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 1)

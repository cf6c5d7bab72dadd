"""The README tells the truth: its file tree names every file, its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_file_tree_is_the_package() -> None:
    files = {
        str(path.relative_to(ROOT / "src/octavo"))
        for path in (ROOT / "src/octavo").rglob("*.py")
        if path.name != "__init__.py"
    }
    tree = README.split("## The house")[1].split("```text")[1].split("```")[0]
    room, listed = "", set()
    for line in tree.splitlines():
        if match := re.match(r"  (\w+)/ ", line):
            room = match.group(1) + "/"
        elif match := re.match(r"    (\w+\.py) +\S", line):
            listed.add(room + match.group(1))
        elif match := re.match(r"  (\w+\.py) +\S", line):
            listed.add(match.group(1))
    assert listed == files


def test_make_targets_and_commands_exist() -> None:
    from octavo.cli import app

    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([a-z-]+)", README):
        assert f"\n{target}:" in makefile, target
    commands = {command.name for command in app.registered_commands}
    assert set(re.findall(r"^octavo (\w+)", README, re.MULTILINE)) <= commands

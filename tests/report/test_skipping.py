"""Where there is no browser, the tests that need one say so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_the_browser_tests_are_skipped_visibly_without_chromium(tmp_path: Path) -> None:
    tests = Path(__file__).parent / "test_page_in_browser.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    run = subprocess.run(
        command,
        env={**os.environ, "PATH": str(tmp_path)},  # an empty folder
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    summary = run.stdout.splitlines()[-1]
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" in summary and "passed" not in summary
    reasons = [line for line in run.stdout.splitlines() if line.startswith("SKIPPED")]
    assert reasons and all("no chromium and chromedriver: apt-get install" in line for line in reasons)

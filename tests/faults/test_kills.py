"""Kills at random moments, one of each command; `python tests/support/kills.py` does fifty of each of four commands."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).resolve().parent.parent / "support"
COMMANDS = ("quantize", "sample", "evaluate")
"""A study takes minutes; one that is interrupted: tests/study/test_run.py."""
PROGRAM = """
import json, random, sys
from pathlib import Path
from kills import finish, prepare, trial
folder = Path(sys.argv[1])
rng = random.Random(int(sys.argv[2]))
for job in prepare(folder):
    if job.name in sys.argv[3:]:
        place = folder / f"{job.name}-whole"
        place.mkdir()
        seconds = finish(job, place)
        right, said = job.look(place / "out"), {"killed": 0}
        for _ in range(5):  # one that ended before it was to be killed proves nothing
            said = said if said["killed"] else trial(job, folder, right, seconds, rng, most=1)
        print(json.dumps(said), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are killed in forked children")
def test_killed_commands_go_on_to_the_same_bits(tmp_path: Path) -> None:
    """In a process of its own: one that has started threads may not be forked."""
    seed = random.Random(6).randrange(1000)
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(seed), *COMMANDS],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT), *sys.path]), "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    killed = {said["job"]: said["killed"] for said in map(json.loads, ran.stdout.splitlines())}
    assert set(killed) == set(COMMANDS) and min(killed.values()) >= 1, ran.stdout

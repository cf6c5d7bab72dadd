"""Signals are heard after cores of OpenVINO have come and gone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import DDIMPipeline

import octavo

END_IN_ORDER = """
import gc, os, signal, sys, time
import octavo

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs beside itself
first, second = (octavo.accelerate(octavo.load(sys.argv[1]), threads=1) for _ in range(2))
del first
gc.collect()
del second
gc.collect()
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)
except KeyboardInterrupt:
    print("heard")
"""

GO_ON_IN_A_CHILD = """
import gc, os, signal, sys
import octavo

fast = octavo.accelerate(octavo.load(sys.argv[1]), threads=1)
fast(num_inference_steps=1, output_type="np")
del fast
gc.collect()
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
signal.alarm(120)
octavo.accelerate(octavo.load(sys.argv[1]), threads=1)(num_inference_steps=1, output_type="np")
print("evaluated", flush=True)
os._exit(0)
"""


@pytest.fixture
def converted(saved: Path, quantized: DDIMPipeline) -> Path:
    """The folder of a pipeline whose graph is in the cache."""
    octavo.accelerate(quantized, threads=1)
    return saved


def ran(script: str, *arguments: object, flags: tuple[str, ...] = ()) -> str:
    command = [sys.executable, *flags, "-c", script, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # torch's pool of threads is not forked either
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout


@pytest.mark.parametrize("flags", [(), ("-X", "faulthandler")], ids=["no stack", "faulthandler's stack"])
def test_an_interrupt_is_heard_after_two_networks_are_let_go(converted: Path, flags: tuple[str, ...]) -> None:
    """By cores as OpenVINO makes them, the process ended by a segmentation fault."""
    assert ran(END_IN_ORDER, converted, flags=flags) == "heard\n"


def test_no_other_core_is_made() -> None:
    source = Path(octavo.__file__).parent
    makers = [
        path
        for path in source.rglob("*.py")
        if re.search(r"\bCore\(|\b(openvino|ov)\.compile_model", path.read_text())
    ]
    assert makers == [source / "runtimes" / "core.py"]


def test_a_child_by_fork_goes_on_where_its_parent_let_go(converted: Path) -> None:
    """By one core for the whole process, the child waited for threads that it has not."""
    assert ran(GO_ON_IN_A_CHILD, converted, flags=("-W", "ignore::DeprecationWarning")) == "evaluated\n"

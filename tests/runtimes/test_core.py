"""One core of OpenVINO for a process, so that Ctrl-C is heard after networks have come and gone."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import octavo
from octavo.runtimes import core
from octavo.runtimes.core import openvino_core

ENDS_IN_ORDER = """
import os, signal, sys, time
import octavo

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs beside itself
first, second = (octavo.accelerate(octavo.load(sys.argv[1]), threads=1) for _ in range(2))
del first
del second
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)
except KeyboardInterrupt:
    print("heard")
"""


def test_an_interrupt_is_heard_after_two_networks_are_let_go(saved: Path, quantized) -> None:  # type: ignore[no-untyped-def]
    """By cores of their own, the process ended by a segmentation fault."""
    octavo.accelerate(quantized, threads=1)  # converted once, here
    done = subprocess.run([sys.executable, "-c", ENDS_IN_ORDER, str(saved)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "heard\n", done.stderr


def test_every_thread_has_the_same_and_a_child_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(4) as threads:
        (made,) = set(threads.map(lambda _: openvino_core(), range(8)))
    assert made is openvino_core()
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: -1)
        assert openvino_core() is not made
    core._cores.pop(-1)
    assert openvino_core() is made

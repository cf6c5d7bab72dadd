"""Peak memory of calibration: 1,024 samples against 128, each in a process of its own.

python benchmarks/bench_memory.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import peers

SAMPLES = (128, 1024)


def calibrate(samples: int) -> None:
    """Calibrate the bundled model from nothing and print the process's peak resident memory in MB."""
    import octavo

    with tempfile.TemporaryDirectory() as workdir:
        octavo.quantize(
            octavo.load("digits"), octavo.PTQ4DM(samples=samples, steps=20), workdir=workdir, progress=False
        )
    status = Path("/proc/self/status").read_text()  # VmHWM: ru_maxrss would start at the parent's
    print(json.dumps(int(status.split("VmHWM:")[1].split()[0]) / 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    if options.samples:
        calibrate(options.samples)
        return
    peaks: dict[int, list[float]] = {samples: [] for samples in SAMPLES}
    for _ in range(options.rounds):
        for samples in SAMPLES:
            command = [sys.executable, __file__, "--samples", str(samples)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            peaks[samples].append(json.loads(output.strip().splitlines()[-1]))
            print(f"{samples:5d} samples: peak {peaks[samples][-1]:.0f} MB")
    ratio = max(peaks[1024]) / min(peaks[128])
    print(f"1024 over 128 samples, worst over best: {ratio:.3f}x")
    peers.save(
        "memory", {"peak_mb": {str(k): v for k, v in peaks.items()}, "ratio_worst_over_best": round(ratio, 4)}
    )


if __name__ == "__main__":
    main()

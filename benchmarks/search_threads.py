"""What two threads do to a range search beside another busy process: why it computes on one (octavo.threads).

    python benchmarks/search_threads.py

The range search of one layer's weights (96 to 96 channels, 3x3, per channel, L_2.4) as it is, on one thread, and by as
many threads as torch has, in turn in one process: first as the machine is, then with a process that computes all the
time for each of --busy. Seconds: median with quartiles; the ratio is of the same round.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import peers
import torch

from octavo.evaluation.speed import format_table, table, take_turns
from octavo.quantization import QuantSpec, ranges

ONE, ALL = "one thread", "torch's threads"
BUSY = "while True: pass"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", type=int, default=1, help="processes beside it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    weight = torch.randn(96, 96, 3, 3, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(8, True, "per_channel")
    on_one_thread = ranges._search
    on_all = on_one_thread.__wrapped__  # type: ignore[attr-defined]

    def search(how: object) -> None:
        ranges._search = how  # type: ignore[assignment]
        try:
            ranges.search_values(weight, spec)
        finally:
            ranges._search = on_one_thread

    engines = {ONE: lambda: search(on_one_thread), ALL: lambda: search(on_all)}
    found = {}
    for count in (0, options.busy):
        others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
        try:
            timings = take_turns(engines, rounds=options.rounds, warm_up=1)
        finally:
            for other in others:
                other.kill()
        found[count] = table(timings, ALL)
        print(f"{count} busy processes beside it\n{format_table(found[count], 'search', ALL)}\n")
    peers.save("search_threads", {**vars(options), "beside": found})


if __name__ == "__main__":
    main()

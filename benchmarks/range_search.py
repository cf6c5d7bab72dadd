"""Range searches that leave out the candidates which cannot win (quantization/ranges.py), beside all of them.

    python benchmarks/range_search.py

Histograms of 200,000 values of five distributions, searched for 8, 6 and 4 bits, asymmetric and symmetric, in turn in
one process, on one thread. The ranges found must be the same. Seconds of all: median with quartiles; the ratio is of
the same round.
"""

from __future__ import annotations

import argparse

import peers
import torch

from octavo.evaluation.speed import format_table, table, take_turns
from octavo.quantization import QuantSpec, ranges
from octavo.quantization.grid import count, exponent_of

SOME, ALL = "those that can win", "all candidates"
SPECS = [QuantSpec(bits, symmetric=symmetric) for bits in (8, 6, 4) for symmetric in (False, True)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    values = [
        normal,
        torch.nn.functional.silu(2 * normal),
        normal.relu(),
        normal**3,
        normal.sigmoid() * 3 - 1,
    ]
    histograms = []
    for x in values:
        exponent = exponent_of(float(x.min()), float(x.max()), ranges.BINS)
        histograms.append((count(x, exponent, ranges.BINS), exponent, x.min(), x.max()))
    looks = ranges.LOOKS

    def search(every: int) -> list[tuple[float, int]]:
        ranges.LOOKS = every
        try:
            found = [ranges.search_histogram(*one, spec) for one in histograms for spec in SPECS]
        finally:
            ranges.LOOKS = looks
        return [(qparams.scale.item(), qparams.zero_point.item()) for qparams in found]

    never = ranges.CANDIDATES + 1
    same = search(looks) == search(never)
    engines = {SOME: lambda: search(looks), ALL: lambda: search(never)}
    found = table(take_turns(engines, rounds=options.rounds, warm_up=1), ALL)
    print(f"the same ranges: {same}\n{format_table(found, 'search', ALL)}")
    peers.save(
        "range_search",
        {**vars(options), "searches": len(histograms) * len(SPECS), "same": same, "times": found},
    )


if __name__ == "__main__":
    main()

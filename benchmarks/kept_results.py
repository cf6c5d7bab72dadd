"""What kept results save (calibration/kept_results.py): activation errors of the bundled model, with and without.

    python benchmarks/kept_results.py

In turn in one process, on one thread: the stage that measures what rounding each layer's activations does, on what
`best` collects. The errors must be the same to the bit. Seconds: median with quartiles; the ratio is of the same round.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import peers
import torch

import octavo
from octavo.calibration import steps
from octavo.calibration.activation_errors import Errors, activation_errors
from octavo.evaluation.speed import format_table, table, take_turns

KEPT, AGAIN = "what is in front is kept", "computed again"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}

    def measured(*args: Any, state: Path, **kwargs: Any) -> Errors:
        def run(path: Path | None) -> Errors:
            state.unlink(missing_ok=True)
            return activation_errors(*args, state=path, **kwargs)

        found = [run(path) for path in (state, None)]
        figures["same"] = torch.equal(found[0].bf16, found[1].bf16) and all(
            torch.equal(errors, found[1].layers[name]) for name, errors in found[0].layers.items()
        )
        engines = {KEPT: lambda: run(state), AGAIN: lambda: run(None)}
        figures["times"] = table(take_turns(engines, rounds=options.rounds, warm_up=0), AGAIN)
        return found[0]

    steps.activation_errors = measured  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        recipe = octavo.named_recipe("best")
        octavo.quantize(octavo.load("digits"), recipe, workdir=folder, progress=False)
    print(f"the same errors: {figures['same']}\n{format_table(figures['times'], 'stage', AGAIN)}")
    peers.save("kept_results", {**vars(options), **figures})


if __name__ == "__main__":
    main()

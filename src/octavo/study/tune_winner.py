"""Where `octavo tune` writes its winner: a pipeline folder, quantized or not, that its next run may replace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.checkpoint import save_pipeline
from octavo.checkpoint.save import check_target
from octavo.errors import OctavoError
from octavo.files import atomic_path, read_json
from octavo.places import check_place
from octavo.study.tune_networks import FLOAT

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PIPELINE, RESULTS = "pipeline", "tune.json"


def check_winner_place(out: Path) -> None:
    """Raise `OctavoError` unless the winner can be written into `out`: to be asked before anything is made."""
    check_place(out / RESULTS)
    if not _is_float_winner(out):
        check_target(out / PIPELINE)


def save_winner(pipeline: DiffusionPipeline, out: Path) -> None:
    """Write the pipeline to `out`/pipeline, whole or not at all, in the place of an earlier winner.

    Quantized folders are known by what they hold; one in full precision by the tune.json beside it. Raises
    `OctavoError` for a folder that holds anything else.
    """
    check_winner_place(out)
    with atomic_path(out / PIPELINE) as temporary:
        save_pipeline(pipeline, temporary)


def _is_float_winner(out: Path) -> bool:
    """Whether `out`/pipeline is what an earlier run wrote in full precision, and nothing else."""
    index = out / PIPELINE / "model_index.json"
    if not (index.is_file() and (out / RESULTS).is_file()):
        return False
    try:
        results: Any = read_json(out / RESULTS)
        known = {index.name, *read_json(index)}
        return (
            results["winner"]["recipe"] == FLOAT and {path.name for path in index.parent.iterdir()} <= known
        )
    except (OctavoError, LookupError, TypeError):
        return False

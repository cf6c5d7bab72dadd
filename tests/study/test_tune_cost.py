from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import octavo
from octavo.calibration.collect import collect_pairs
from octavo.evaluation.trajectory_methods import SearchOptions
from octavo.study.tune_cost import cost_at_most
from octavo.study.tune_networks import evaluations_of_pairs
from octavo.study.tune_options import Goal, TuneOptions
from octavo.study.tune_plan import make_plan

# diffusers' UniPC hands a torch tensor to NumPy, of which torch 2.13 and NumPy 2 together warn.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]
OPTIONS: dict[str, Any] = {
    "recipes": ("float",),
    "solvers": ("ddim", "unipc"),
    "spacings": ("dp", "trailing"),
    "steps": (2, 3, 5),
    "num_images": 8,
    "verify_images": 10,
    "reference_steps": 6,
    "search": SearchOptions(candidates=6, images=2),
}


def cost(pipeline: Any, goal: str, **changes: Any) -> dict[str, int]:
    options = TuneOptions(**{**OPTIONS, **changes})
    own: dict[str, Any] = {
        "calibration": {"samples": 4, "steps": 2},
        "seed": 0,
        "batch_size": 4,
        "inputs": None,
    }
    return cost_at_most(pipeline, Goal.of(goal), options, make_plan(pipeline, options), **own)


def test_every_kind_is_counted(pipeline: Any) -> None:
    found = cost(pipeline, "quality=reference")
    assert found["search"] == 6 * 2, "once for both solvers"
    assert cost(pipeline, "quality=8", solvers=("ddim", "deis"))["search"] == 2 * 6 * 2, (
        "DEIS may not end at 0"
    )
    assert found["reference"] == 8 * 6 and found["timing"] == 11 * 4
    assert found["scores"] == 4 * 8 * (5 + 3 + 2)
    assert found["verification"] == 12 * (3 * 5 + 6), "in whole batches"
    assert found["calibration"] == 0


def test_a_time_asks_each_curve_once_and_decibels_need_the_references_images(pipeline: Any) -> None:
    found = cost(pipeline, "latency=1", metric="psnr", recipes=("float", "ptq4dm"))
    assert found["scores"] == 2 * 4 * 8 * 5 and found["reference"] == 8 * 6
    assert found["verification"] == 0 and found["search"] == 2 * 6 * 2 and found["calibration"] > 0
    assert cost(pipeline, "quality=8")["reference"] == 0, "a number needs no reference to be the bar"


def test_the_pairs_take_what_is_said(pipeline: Any, tmp_path: Path) -> None:
    recipe = octavo.PTQ4DM(samples=10, steps=5, pairs_per_trajectory=2)
    rows: list[int] = []
    hook = pipeline.unet.register_forward_hook(
        lambda module, args, kwargs, out: rows.append(len((*args, *kwargs.values())[0])), with_kwargs=True
    )
    try:
        collect_pairs(pipeline, recipe, tmp_path, batch_size=2, progress=False)
    finally:
        hook.remove()
    assert sum(rows) == evaluations_of_pairs(pipeline, recipe, 0, 2, None) > 0

"""A guided, class-conditional transformer with a learned variance through the whole path."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline

import octavo
from octavo.diffusion import first_call
from octavo.evaluation.generate import generate

INPUTS = {"class_labels": [1, 5, 7], "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def int8(dit: DiTPipeline) -> DiTPipeline:
    recipe = octavo.PTQ4DM(samples=6, steps=3, learned_variance=True, network_output=True)
    return octavo.quantize(dit, recipe, batch_size=3, inputs=INPUTS, progress=False)


def test_it_saves_and_loads(int8: DiTPipeline, tmp_path: Path) -> None:
    int8.save_pretrained(tmp_path / "dit-int8")
    loaded = octavo.load(tmp_path / "dit-int8")
    loaded.set_progress_bar_config(disable=True)
    common = {"steps": 2, "inputs": INPUTS, "progress": False}
    assert (generate(loaded, 3, **common) == generate(int8, 3, **common)).all()
    assert sorted(loaded.transformer.octavo_operations) == ["learned_variance", "network_output"]


def test_it_runs_in_int8_through_guidance(dit: DiTPipeline, int8: DiTPipeline) -> None:
    fast = octavo.accelerate(int8, precision="f32", batch_size=3, inputs=INPUTS)
    rows = octavo.audit(fast)
    assert rows and all(row.ok for row in rows)
    args, kwargs = first_call(dit, batch_size=3, inputs=INPUTS)
    with torch.no_grad():
        exact, simulated, executed = (
            pipeline.transformer(*args, **kwargs).sample for pipeline in (dit, int8, fast)
        )
    error = (simulated - exact).norm()
    assert (executed - simulated).norm() < 0.5 * error < 0.1 * exact.norm()
    assert generate(fast, 3, steps=2, inputs=INPUTS, progress=False).shape == (3, 8, 8, 3)

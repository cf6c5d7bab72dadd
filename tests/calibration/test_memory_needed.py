from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

import octavo
from octavo import memory
from octavo.calibration import memory_needed
from octavo.calibration.memory_needed import bytes_needed
from octavo.calibration.quantize import planned


def test_too_little_memory_is_told_in_one_line(
    pipeline: DDIMPipeline,
    recipe: octavo.PTQ4DM,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And nothing is said where there is enough, or where the system does not tell."""
    plan = planned(pipeline, recipe)
    needed = bytes_needed(plan.denoiser, recipe, plan.rules)
    for there, lines in ((needed - 1, 1), (needed, 0), (None, 0)):
        monkeypatch.setattr(memory_needed, "available", lambda there=there: there)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            octavo.quantize(pipeline, recipe, batch_size=4, progress=False)
        told = [record.getMessage() for record in caplog.records if "memory:" in record.getMessage()]
        assert len(told) == lines and "\n" not in "".join(told)


def test_second_order_rounding_takes_more(pipeline: DDIMPipeline) -> None:
    nearest, best = octavo.PTQ4DM(samples=2, steps=2), octavo.named_recipe("best", samples=2, steps=2)
    plan = planned(pipeline, nearest)
    weights = sum(dict(plan.denoiser.named_modules())[name].weight.numel() for name in plan.rules)
    assert bytes_needed(plan.denoiser, nearest, plan.rules) == weights
    widest = 96 * 9  # the first convolution of the second block of the way up: 64 + 32 channels
    assert bytes_needed(plan.denoiser, best, plan.rules) > weights + (4 + 16) * widest**2


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = memory.available()
    if everything is None:
        pytest.skip("this system does not tell")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    for limit, expected in (("max", None), ("5000000", 5000000 - 4000000 + 1500000), ("1000", 0)):
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text("4000000")
        (tmp_path / "memory.stat").write_text("anon 2500000\nfile 1500000\n")
        there = memory.available()
        assert there == expected if expected is not None else there > 5000000


PEAK = """
import json, sys
from pathlib import Path
from diffusers import DDIMPipeline
import octavo

def memory(kind):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[kind].split()[0])

pipeline = DDIMPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
before = memory("VmHWM")
recipe = octavo.PTQ4DM(samples=2, steps=1, metric="minmax")
octavo.quantize(pipeline, recipe, progress=False, workdir=Path(sys.argv[1]) / "work")
print(json.dumps([memory("VmHWM") - before, memory("RssShmem")]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_quantizing_holds_the_float_weights_once(tmp_path: Path) -> None:
    """They are mapped from their file and let go layer by layer.

    In a process of its own: a peak is the process's.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=4,
            layers_per_block=1,
            block_out_channels=(512, 512),
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            norm_num_groups=8,
            add_attention=False,
        )
    weights = 4 * sum(parameter.numel() for parameter in unet.parameters())
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path)
    os.sync()  # what is not on the disk yet cannot be let go
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert weights > 250e6
    took, in_memory = json.loads(ran.stdout.splitlines()[-1])
    if in_memory > 48 * 2**20:
        pytest.skip("the temporary folder is kept in memory")
    assert took < 1.3 * weights, took / weights

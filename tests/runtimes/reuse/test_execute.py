"""Sampling with reuse: which steps compute what, in torch and in int8."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch

import octavo
from octavo.diffusion.reuse import ReusePlan
from octavo.errors import OctavoError
from octavo.evaluation.generate import generate
from octavo.runtimes import executor_of
from octavo.runtimes.reuse import Reuser

TIMESTEPS = (801.0, 601.0, 401.0, 201.0, 1.0)
STEPS = len(TIMESTEPS)
OFTEN = ReusePlan(TIMESTEPS, (1, 0, 1, 0, 0), depth=1)
ALWAYS = ReusePlan(TIMESTEPS, (1,) * STEPS, depth=1)


def _images(pipeline: Any, count: int = 2, batch_size: int = 2) -> np.ndarray:
    return generate(pipeline, count, steps=STEPS, batch_size=batch_size, progress=False)


@pytest.fixture(scope="module")
def offset(quantized: Any) -> Any:
    """The quantized pipeline, on the timesteps of the plans."""
    trajectory = octavo.Trajectory(tuple(map(int, TIMESTEPS)), 1000, "epsilon", "by hand")
    return octavo.with_trajectory(quantized, trajectory)


def test_whole_steps_are_the_plain_sampler(offset: Any) -> None:
    assert np.array_equal(_images(octavo.with_reuse(offset, ALWAYS)), _images(offset))


def test_each_step_computes_what_the_plan_says(offset: Any) -> None:
    reused = octavo.with_reuse(offset, OFTEN)
    reuser = reused.unet.forward
    assert isinstance(reuser, Reuser)
    first = _images(reused)
    assert reuser.evaluations == {"whole": 2, "outer": 3}
    assert np.array_equal(_images(reused), first)  # nothing is left over from the run before
    assert not np.allclose(first, _images(offset), atol=1e-4)


def test_int8_graphs_do_what_torch_does(offset: Any) -> None:
    fast = octavo.accelerate(offset, precision="f32", batch_size=2, reuse=OFTEN)
    executor = executor_of(fast)
    assert executor is not None and len(executor.graphs) == 2
    rows = octavo.audit(fast)
    assert all(row.ok for row in rows) and len(rows) == len(octavo.audit(offset))
    simulated = octavo.with_reuse(offset, OFTEN).unet
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for t in TIMESTEPS:
            x = torch.randn(2, 3, 8, 8, generator=generator)
            ours, theirs = fast.unet(x, t).sample, simulated(x, t).sample
            assert float((ours - theirs).norm() / theirs.norm()) < 0.02
    assert np.array_equal(_images(fast), _images(fast))


def test_other_timesteps_compute_everything_and_say_so(
    quantized: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plan = ReusePlan((999.0, 998.0), (1, 0), depth=1)
    with caplog.at_level(logging.WARNING):
        images = _images(octavo.with_reuse(quantized, plan))
    assert np.array_equal(images, _images(quantized))
    assert [record.message for record in caplog.records].count(
        "reuse plan: timestep 800 is none of its 2; the whole network is computed there (make a plan for these steps)"
    ) == 1


def test_each_call_at_one_timestep_has_its_own_features(offset: Any) -> None:
    """As sequential guidance calls: twice at each timestep, on different inputs."""
    unet = octavo.with_reuse(offset, OFTEN).unet
    alone = [octavo.with_reuse(offset, OFTEN).unet for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    inputs = [[torch.randn(1, 3, 8, 8, generator=generator) for _ in range(2)] for _ in TIMESTEPS]
    with torch.no_grad():
        for t, pair in zip(TIMESTEPS, inputs, strict=True):
            for own, x in zip(alone, pair, strict=True):
                assert torch.equal(unet(x, t).sample, own(x, t).sample)


def test_a_run_that_starts_within_the_plan_computes_everything(offset: Any) -> None:
    plain, reused = offset.unet, octavo.with_reuse(offset, OFTEN).unet
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(reused(x, 601.0).sample, plain(x, 601.0).sample)
        reused(x, 401.0)
        wider = torch.cat([x, x])
        assert torch.equal(reused(wider, 201.0).sample, plain(wider, 201.0).sample)


def test_rows_at_different_timesteps_are_refused(offset: Any) -> None:
    reused = octavo.with_reuse(offset, OFTEN).unet
    with pytest.raises(OctavoError, match="rows at different timesteps"):
        reused(torch.zeros(2, 3, 8, 8), torch.tensor([801, 601]))


def test_a_plan_of_another_model_is_refused(offset: Any) -> None:
    foreign = ReusePlan(TIMESTEPS, (1, 0, 1, 0, 0), depth=1, model="another")
    for use in (octavo.with_reuse, lambda p, plan: octavo.accelerate(p, reuse=plan)):
        with pytest.raises(OctavoError, match="made for another model"):
            use(offset, foreign)

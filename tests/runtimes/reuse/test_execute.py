"""Sampling with reuse: which steps compute what, in torch and in int8."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

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


@pytest.mark.parametrize("order", [0, 1])
def test_int8_graphs_do_what_torch_does(offset: Any, order: int) -> None:
    plan = replace(OFTEN, order=order)
    fast = octavo.accelerate(offset, precision="f32", batch_size=2, reuse=plan)
    executor = executor_of(fast)
    assert executor is not None and len(executor.graphs) == 2
    rows = octavo.audit(fast)
    assert all(row.ok for row in rows) and len(rows) == len(octavo.audit(offset))
    simulated = octavo.with_reuse(offset, plan).unet
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


@pytest.mark.parametrize("order", [0, 1])
def test_each_call_at_one_timestep_has_its_own_features(offset: Any, order: int) -> None:
    """As sequential guidance calls: twice at each timestep, on different inputs."""
    plan = replace(OFTEN, order=order)
    unet = octavo.with_reuse(offset, plan).unet
    alone = [octavo.with_reuse(offset, plan).unet for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    inputs = [[torch.randn(1, 3, 8, 8, generator=generator) for _ in range(2)] for _ in TIMESTEPS]
    with torch.no_grad():
        for t, pair in zip(TIMESTEPS, inputs, strict=True):
            for own, x in zip(alone, pair, strict=True):
                assert torch.equal(unet(x, t).sample, own(x, t).sample)


class Toy(nn.Module):
    """Its deep features are a polynomial in the timestep; its output is their sum with the image."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True) -> Any:
        return (sample,)


def _toy(order: int, degree: int) -> tuple[Reuser, list[torch.Tensor]]:
    """Evaluated by a plan of that order, and the features that it hands to its outer part."""
    handed: list[torch.Tensor] = []

    def whole(sample: torch.Tensor, timestep: torch.Tensor, **_: Any) -> tuple[torch.Tensor, ...]:
        deep = torch.ones_like(sample).double() * (1 + float(timestep[0])) ** degree
        return sample + deep, deep

    def outer(sample: torch.Tensor, deep_features: torch.Tensor, **_: Any) -> tuple[torch.Tensor, ...]:
        handed.append(deep_features)
        return (sample + deep_features,)

    plan = ReusePlan((1024.0, 768.0, 512.0, 384.0, 256.0, 128.0, 0.0), (1, 1, 0, 1, 0, 0, 0), 1, order=order)
    return Reuser(Toy(), plan, whole, outer), handed


@pytest.mark.parametrize("order", [0, 1, 2])
def test_features_that_are_polynomials_are_forecast_exactly(order: int) -> None:
    """Of the order's degree: identical to evaluating the whole toy; of one more: not."""
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    for degree in (order, order + 1):
        reuser, handed = _toy(order, degree)
        off = []
        for t in reuser.plan.timesteps:
            told = reuser(x, torch.tensor([t], dtype=torch.float64), return_dict=False)[0]
            off.append(float((told - x - (1 + t) ** degree).abs().max()))
        assert reuser.evaluations == {"whole": 3, "outer": 4} and len(handed) == 4
        if order == 2 and degree == 2:
            assert off[2] > 1  # no more than two whole steps were there yet: order 1
            off[2] = 0.0
        assert (max(off) < 1e-6) == (degree == order)


def test_a_run_never_forecasts_from_the_run_before() -> None:
    """An image-to-image run that starts within the plan has fewer whole steps behind it: a lower order."""
    x = torch.zeros(1, 1, 2, 2)
    reuser, handed = _toy(order=1, degree=1)
    for t in reuser.plan.timesteps:
        reuser(x, torch.tensor([t]), return_dict=False)
    del handed[:]
    for t in (512.0, 384.0, 256.0):
        reuser(x, torch.tensor([t]), return_dict=False)
    assert reuser.evaluations == {"whole": 3 + 2, "outer": 4 + 1}
    assert float(handed[0].max()) == 385.0  # that of 384 as it is


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

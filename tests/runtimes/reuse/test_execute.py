"""Sampling with reuse: which steps compute what, in torch and in int8."""

from __future__ import annotations

import copy
import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import octavo
from octavo.calibration import OUTPUT_CORRECTION, attach_operations
from octavo.diffusion.reuse import ReusePlan
from octavo.errors import OctavoError
from octavo.evaluation.generate import generate
from octavo.quantization import OutputCorrection
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
            assert float((ours - theirs).norm() / theirs.norm()) < 0.03
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


@pytest.fixture(scope="module")
def engine_and_torch(offset: Any) -> list[Any]:
    """The pipeline that reuses features, in torch and in int8."""
    return [
        octavo.with_reuse(offset, OFTEN),
        octavo.accelerate(offset, precision="f32", batch_size=2, threads=1, reuse=OFTEN),
    ]


def _noise(seed: int) -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def _run_by_hand(unet: Any, seed: int) -> torch.Tensor:
    """The outputs of several runs, on the same images at each step."""
    with torch.no_grad():
        return torch.stack([unet(_noise(seed), t).sample for _ in range(4) for t in TIMESTEPS])


@pytest.mark.parametrize("in_engine", [False, True])
@pytest.mark.parametrize("deep", [False, True])
def test_threads_have_features_of_their_own(engine_and_torch: Any, in_engine: bool, deep: bool) -> None:
    pipeline = engine_and_torch[in_engine]
    unets = [(copy.deepcopy(pipeline) if deep else pipeline).unet for _ in range(2)]
    expected = [_run_by_hand(pipeline.unet, k) for k in range(2)]
    found: list[Any] = [None, None]

    def run(k: int) -> None:
        found[k] = _run_by_hand(unets[k], k)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("in_engine", [False, True])
def test_deep_copies_have_features_of_their_own(engine_and_torch: Any, in_engine: bool) -> None:
    a = engine_and_torch[in_engine]
    b = copy.deepcopy(a)
    expected = [_run_by_hand(a.unet, k)[: len(TIMESTEPS)] for k in range(2)]
    with torch.no_grad():
        pairs = [[p.unet(_noise(k), t).sample for k, p in enumerate((a, b))] for t in TIMESTEPS]
    for k in range(2):
        assert torch.equal(torch.stack([pair[k] for pair in pairs]), expected[k])


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("in_engine", [False, True])
@pytest.mark.parametrize("deep", [False, True])
def test_nothing_is_taken_from_a_run_that_was_interrupted(
    engine_and_torch: Any, in_engine: bool, deep: bool
) -> None:
    """Not even by a run that starts where that one would have gone on, as an image-to-image run may."""
    pipeline = engine_and_torch[in_engine]
    pipeline = copy.deepcopy(pipeline) if deep else pipeline
    plain_step = pipeline.scheduler.step

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        raise Interrupted

    pipeline.scheduler.step = interrupt
    with pytest.raises(Interrupted):
        pipeline(num_inference_steps=STEPS, generator=torch.Generator().manual_seed(5), batch_size=2)
    pipeline.scheduler.step = plain_step
    pipeline.scheduler.set_timesteps(STEPS)
    reuser = pipeline.unet.forward if not in_engine else executor_of(pipeline).reuser  # type: ignore[union-attr]
    before = dict(reuser.evaluations)
    with torch.no_grad():
        pipeline.unet(_noise(0), TIMESTEPS[1])
    assert reuser.evaluations == {"whole": before["whole"] + 1, "outer": before["outer"]}


def test_a_call_that_leaves_out_steps_forgets_features(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.zeros(1, 1, 2, 2)
    reuser, handed = _toy(order=0, degree=1)
    with caplog.at_level(logging.WARNING):
        for t in (1024.0, 512.0):
            reuser(x, torch.tensor([t]), return_dict=False)
    assert not handed and reuser.evaluations == {"whole": 2, "outer": 0}
    assert "1 of its 7 steps are left out between the timesteps 1024 and 512" in caplog.text


def test_a_pipeline_with_fewer_steps_than_the_plan_is_refused(quantized: Any) -> None:
    """Its timesteps are some of the plan's: nothing else would tell."""
    plan = ReusePlan(tuple(100.0 * k for k in range(9, -1, -1)), (1, 0) * 5, depth=1)
    for reused in (octavo.with_reuse(quantized, plan), octavo.accelerate(quantized, reuse=plan)):
        assert np.isfinite(generate(reused, 1, steps=10, progress=False)).all()
        with pytest.raises(
            OctavoError,
            match="is for 10 steps, of which this run leaves out 1 between the timesteps 800 and 600",
        ):
            generate(reused, 1, steps=5, progress=False)
        assert np.isfinite(generate(reused, 1, steps=10, progress=False)).all()


@pytest.fixture(scope="module")
def corrected(offset: Any) -> Any:
    """With a correction of its outputs that nobody overlooks."""
    other = copy.copy(offset)
    other.unet = copy.deepcopy(offset.unet)
    slopes = torch.tensor([[1.0, -1.0, 0.0], [0.0, 4.0, -8.0]]).view(2, 3, 1, 1)
    table = OutputCorrection(torch.tensor([100.0, 900.0]), torch.tensor([0.5, -0.5]), slopes)
    attach_operations(other.unet, {OUTPUT_CORRECTION: table})
    return other


def test_outputs_are_corrected_once(corrected: Any) -> None:
    assert np.array_equal(_images(octavo.with_reuse(corrected, ALWAYS)), _images(corrected))


def test_costs_are_measured_on_outputs_that_are_corrected_once(corrected: Any) -> None:
    """As the engine does, whose graph has the correction in it."""
    quick: dict[str, Any] = {"images": 2, "batch_size": 2, "order": 0, "max_age": 1, "progress": False}
    fast = octavo.accelerate(corrected, precision="f32", batch_size=2, threads=1)
    ours, engine = (octavo.measure_reuse(p, STEPS, **quick).costs for p in (corrected, fast))
    known = np.isfinite(ours)
    assert np.allclose(ours[known], engine[known], rtol=0.05)


def test_a_half_precision_network_stays_in_its_dtype(make_pipeline: Any) -> None:
    pipeline = make_pipeline()
    timesteps = (800.0, 600.0, 400.0, 200.0, 0.0)
    float32 = octavo.measure_reuse(pipeline, STEPS, images=1, progress=False)
    pipeline.unet.to(torch.bfloat16)
    reused = octavo.with_reuse(pipeline, ReusePlan(timesteps, (1,) * STEPS, depth=1)).unet
    x = _noise(0).bfloat16()
    with torch.no_grad():
        for t in timesteps:
            assert torch.equal(reused(x, t).sample, pipeline.unet(x, t).sample)
        reused = octavo.with_reuse(pipeline, ReusePlan(timesteps, (1, 1, 0, 0, 0), 1, order=1)).unet
        outputs = [reused(x, t).sample for t in timesteps]
    assert reused.forward.evaluations == {"whole": 2, "outer": 3}
    assert all(output.dtype == torch.bfloat16 and bool(output.isfinite().all()) for output in outputs)
    costs = octavo.measure_reuse(pipeline, STEPS, images=1, progress=False)
    known = np.isfinite(float32.costs) & (float32.costs > 0)
    assert np.isfinite(costs.costs[known]).all()
    assert costs.costs[known].mean() == pytest.approx(float32.costs[known].mean(), rel=0.5)


def test_a_pipeline_that_reuses_features_is_refused_in_one_line(offset: Any, tmp_path: Path) -> None:
    reused = octavo.with_reuse(offset, OFTEN)
    for use, mend in (
        (octavo.accelerate, r"accelerate\(reuse=plan\)"),
        (lambda p: octavo.export(p, tmp_path / "x"), "export the original"),
        (lambda p: octavo.with_reuse(p, OFTEN), "give the original"),
        (lambda p: octavo.measure_reuse(p, STEPS), "measure the original"),
    ):
        with pytest.raises(OctavoError, match=f"its unet reuses features by octavo.with_reuse; .*{mend}"):
            use(reused)
    with pytest.raises(OctavoError, match="its unet is accelerated"):
        octavo.with_reuse(octavo.accelerate(offset, precision="f32"), OFTEN)


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

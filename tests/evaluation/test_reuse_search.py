"""What reusing features costs, measured: against the images that it really changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import octavo
from octavo.diffusion import probe
from octavo.diffusion.exchange import exchange_scheduler
from octavo.diffusion.samplers import with_scheduler
from octavo.errors import OctavoError
from octavo.evaluation.generate import generate

STEPS = 6
QUICK: dict[str, Any] = {"images": 4, "batch_size": 4, "order": 0, "progress": False}


@pytest.fixture(scope="module")
def costs(pipeline: Any) -> Any:
    return octavo.measure_reuse(pipeline, STEPS, **QUICK)


def test_costs_have_the_form_that_plans_need(costs: Any) -> None:
    assert len(costs.timesteps) == STEPS and costs.costs.shape == (STEPS, STEPS + 1)
    for i in range(STEPS):
        assert costs.costs[i, i + 1] == 0.0
        assert np.isinf(costs.costs[i, : i + 1]).all() and (costs.costs[i, i + 2 :] > 0).all()
    assert costs.plan(STEPS).facts["cost"] == 0.0
    by_count = [costs.plan(count).facts["cost"] for count in range(1, STEPS + 1)]
    assert by_count == sorted(by_count, reverse=True)
    assert all(costs.plan(n).facts["cost"] <= costs.plan(n).facts["cost_of_uniform"] for n in range(1, STEPS))


def test_even_steps_cost_what_the_cheapest_plan_says_they_do(costs: Any) -> None:
    even = costs.plan(2, even=True)
    assert even.recomputed == (1, 0, 0, 1, 0, 0) and even.model == costs.model
    assert even.facts["cost"] == costs.plan(2).facts["cost_of_uniform"] >= costs.plan(2).facts["cost"]


@pytest.mark.parametrize("order", [1, 2])
def test_forecasts_are_planned_for(pipeline: Any, costs: Any, order: int) -> None:
    forecast = octavo.measure_reuse(pipeline, STEPS, **{**QUICK, "order": order})
    assert forecast.costs.shape == (*[STEPS] * (order + 1), STEPS + 1) and forecast.order == order
    whole_once = (0,) * (order + 1)
    assert forecast.costs[whole_once] == pytest.approx(costs.costs[0])  # from one whole step: as it is
    plan = forecast.plan(3)
    assert plan.order == order and sum(plan.recomputed) == 3
    assert plan.facts["cost"] <= forecast.plan(2).facts["cost"]
    images = generate(octavo.with_reuse(pipeline, plan), 2, steps=STEPS, progress=False)
    assert np.isfinite(images).all()


def test_the_cost_tells_the_order_of_what_happens(pipeline: Any, costs: Any) -> None:
    """Of all plans with one reused step, the dearest moves the images more than the cheapest."""
    plain = generate(pipeline, 4, steps=STEPS, progress=False)
    moved = []
    single = [costs.costs[step - 1, step + 1] for step in range(1, STEPS)]
    for step in (1 + int(np.argmin(single)), 1 + int(np.argmax(single))):
        marks = tuple(int(i != step) for i in range(STEPS))
        plan = octavo.ReusePlan(costs.timesteps, marks, 1)
        images = generate(octavo.with_reuse(pipeline, plan), 4, steps=STEPS, progress=False)
        moved.append(float(np.square(images - plain).mean()))
    assert 0 < moved[0] < moved[1]


def test_the_same_whatever_the_batch_size_or_the_engine(pipeline: Any, costs: Any) -> None:
    small = octavo.measure_reuse(pipeline, STEPS, **{**QUICK, "batch_size": 2})
    fast = octavo.accelerate(pipeline, precision="f32", batch_size=4)
    in_engine = octavo.measure_reuse(fast, STEPS, **QUICK)
    known = np.isfinite(costs.costs)
    for other in (small, in_engine):
        assert np.allclose(other.costs[known], costs.costs[known], rtol=1e-3, atol=1e-9)
    again = octavo.measure_reuse(pipeline, STEPS, **QUICK)
    assert np.array_equal(again.costs, costs.costs)
    assert in_engine.model == costs.model


def test_nothing_global_is_touched(pipeline: Any) -> None:
    before, forward = torch.get_rng_state(), pipeline.unet.forward
    octavo.measure_reuse(pipeline, 2, **QUICK)
    assert torch.equal(torch.get_rng_state(), before) and pipeline.unet.forward == forward


def test_ages_are_kept_to(pipeline: Any) -> None:
    young = octavo.measure_reuse(pipeline, STEPS, max_age=1, **QUICK)
    assert np.isinf(young.costs[0, 3]) and np.isfinite(young.costs[0, 2])
    assert young.plan(3).recomputed == (1, 0, 1, 0, 1, 0)
    with pytest.raises(OctavoError, match="no plan of 2 whole steps"):
        young.plan(2)
    with pytest.raises(OctavoError, match="2 even steps are farther apart than max_age"):
        young.plan(2, even=True)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")
@pytest.mark.parametrize(
    "scheduler",
    ["dpmsolver++", "unipc", "heun", "euler", "ddpm", "pndm", "euler_ancestral", "predictor_corrector"],
)
def test_other_solvers_are_measured_and_sampled(pipeline: Any, scheduler: str) -> None:
    """Multistep ones, and one that calls its network twice at a timestep."""
    solved = with_scheduler(pipeline, scheduler)
    costs = octavo.measure_reuse(solved, 4, images=2, progress=False)
    visited = probe(solved, num_inference_steps=4).timesteps
    assert set(costs.timesteps) == set(visited)
    plain = generate(solved, 2, steps=4, progress=False)
    whole = octavo.with_reuse(solved, costs.plan(len(costs.timesteps)))
    assert np.array_equal(generate(whole, 2, steps=4, progress=False), plain)
    reused = octavo.with_reuse(solved, costs.plan(2))
    images = generate(reused, 2, steps=4, progress=False)
    assert np.isfinite(images).all() and not np.array_equal(images, plain)
    assert reused.unet.forward.evaluations["outer"] > 0


def test_a_scheduler_without_noise_levels_is_refused_before_anything_is_evaluated(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import EDMEulerScheduler

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the network is evaluated")

    other = exchange_scheduler(pipeline, EDMEulerScheduler())
    monkeypatch.setattr("diffusers.models.embeddings.Timesteps.forward", never)
    with pytest.raises(OctavoError, match="EDMEulerScheduler"):
        octavo.measure_reuse(other, STEPS, **QUICK)


def test_more_costs_than_can_be_planned_are_refused(pipeline: Any) -> None:
    with pytest.raises(OctavoError, match="order: 2 is too much to plan 1000 steps with"):
        octavo.measure_reuse(pipeline, 1000, **{**QUICK, "order": 2})


def test_guided_transformers_are_measured(dit: Any) -> None:
    import copy

    from diffusers import DiTTransformer2DModel

    deep = copy.copy(dit)
    torch.manual_seed(1)
    config = {**dit.transformer.config, "num_layers": 4}
    deep.register_modules(transformer=DiTTransformer2DModel.from_config(config).eval())
    for parameter in deep.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    inputs = {"class_labels": [1, 2]}
    costs = octavo.measure_reuse(deep, 3, images=2, inputs=inputs, progress=False)
    plan = costs.plan(2)
    images = generate(octavo.with_reuse(deep, plan), 2, steps=3, inputs=inputs, progress=False)
    assert np.isfinite(images).all() and np.isfinite(costs.costs[0, 0, 3])


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"depth": 5}, "depth"),
        ({"images": 0}, "images"),
        ({"max_age": 0}, "max_age"),
        ({"order": 3}, "order: 3"),
    ],
)
def test_counts_out_of_range_are_told(pipeline: Any, changed: dict[str, int], told: str) -> None:
    with pytest.raises(OctavoError, match=told):
        octavo.measure_reuse(pipeline, 3, **{**QUICK, **changed})

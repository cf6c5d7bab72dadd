"""Errors of forecasts, against the same sums written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from octavo.diffusion.reuse import forecast_weights
from octavo.diffusion.reuse.weights import output_weights
from octavo.evaluation.reuse_errors import ForecastErrors
from octavo.runtimes.reuse.networks import DEEP, recording, reusing

TIMESTEPS = [800.0, 600.0, 500.0, 300.0, 200.0, 100.0]


@pytest.fixture(scope="module")
def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 8, 8, generator=generator) for _ in TIMESTEPS]


def _watched(pipeline: Any, inputs: list[torch.Tensor], order: int, max_age: int) -> ForecastErrors:
    unet = pipeline.unet
    watch = ForecastErrors(recording(unet, 1), reusing(unet, 1), unet, order, max_age)
    with torch.no_grad():
        watch.begin(pipeline.scheduler)
        for t, x in zip(TIMESTEPS, inputs, strict=True):
            assert torch.allclose(watch(x, t, return_dict=False)[0], unet(x, t).sample, atol=1e-5)
        watch.end()
    return watch


@pytest.mark.parametrize("whole", [(0,), (0, 2), (1, 2)])
def test_errors_are_the_sums_that_are_told(
    pipeline: Any, inputs: list[torch.Tensor], whole: tuple[int, ...]
) -> None:
    watch = _watched(pipeline, inputs, order=1, max_age=len(TIMESTEPS))
    assert watch.numbers == inputs[0].numel()
    weights = output_weights(pipeline.scheduler, TIMESTEPS)
    record, outer = recording(pipeline.unet, 1), reusing(pipeline.unet, 1)
    summed = torch.zeros_like(inputs[0], dtype=torch.float64)
    with torch.no_grad():
        deep = [record(inputs[i], TIMESTEPS[i])[1] for i in whole]
        for step in range(whole[-1] + 1, len(TIMESTEPS)):
            c = forecast_weights([TIMESTEPS[i] for i in whole], TIMESTEPS[step])
            features = sum(weight * features for weight, features in zip(c, deep, strict=True))
            reused = outer(inputs[step], TIMESTEPS[step], **{DEEP: features})[0]
            summed += float(weights[step]) * (reused - record(inputs[step], TIMESTEPS[step])[0]).double()
            assert watch.errors[whole, step] == pytest.approx(float(summed.square().sum()), rel=1e-3)


def test_every_choice_of_whole_steps_is_measured_within_the_age(
    pipeline: Any, inputs: list[torch.Tensor]
) -> None:
    watch = _watched(pipeline, inputs, order=1, max_age=2)
    asked = {
        (whole, step)
        for step in range(len(TIMESTEPS))
        for i in range(max(0, step - 2), step)
        for whole in ([(h, i) for h in range(max(0, i - 3), i)] or [(0,)])
    }
    assert set(watch.errors) == asked

"""The weights against diffusers' own steps, on normal data whose best prediction is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EDMDPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from octavo.diffusion.reuse.weights import output_weights
from octavo.errors import OctavoError

STEPS = 200
SPREAD = 0.5


def _ideal(scheduler: Any, x: torch.Tensor, t: Any) -> torch.Tensor:
    """The best prediction for x_0 ~ N(0, SPREAD^2)."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        sigma = float(t) / 1000
        a, s = 1 - sigma, sigma
    else:
        a = float(scheduler.alphas_cumprod[t]) ** 0.5
        s = (1 - a**2) ** 0.5
    image = a * SPREAD**2 / (a**2 * SPREAD**2 + s**2) * x
    eps = s / (a**2 * SPREAD**2 + s**2) * x
    kind = scheduler.config.get("prediction_type", "flow")
    return {
        "epsilon": eps,
        "sample": image,
        "v_prediction": a * eps - s * image,
        "flow": eps - image,
    }[kind]


def _final(scheduler: Any, disturbed: int | None, by: float) -> float:
    scheduler.set_timesteps(STEPS)
    x = torch.tensor([1.3], dtype=torch.float64)
    for step, t in enumerate(scheduler.timesteps):
        prediction = _ideal(scheduler, x, t) + (by if step == disturbed else 0.0)
        x = scheduler.step(prediction, t, x).prev_sample.double()
    return float(x)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow"])
@pytest.mark.parametrize("step", [40, 120, STEPS - 1])
def test_an_error_reaches_the_image_by_its_weight(kind: str, step: int) -> None:
    scheduler: Any = (
        FlowMatchEulerDiscreteScheduler()
        if kind == "flow"
        else DDIMScheduler(clip_sample=False, prediction_type=kind, beta_schedule="linear")
    )
    scheduler.set_timesteps(STEPS)
    weights = output_weights(scheduler, scheduler.timesteps.tolist(), SPREAD**2)
    by = 0.05
    moved = (_final(scheduler, step, by) - _final(scheduler, None, 0.0)) / by
    assert moved == pytest.approx(weights[step], rel=0.1, abs=2e-4)


def test_a_scheduler_without_levels_is_refused() -> None:
    with pytest.raises(OctavoError, match="has no alpha-bars"):
        output_weights(EDMDPMSolverMultistepScheduler(), [1.0])

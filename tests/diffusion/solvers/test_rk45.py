from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor

from octavo.diffusion import generators
from octavo.diffusion.solvers.rk45 import solve_rk45
from octavo.errors import OctavoError


def exact(scheduler: Any, hills: Any, count: int, size: int = 8) -> np.ndarray:
    """Images of the flow from the pipeline's noise to timestep 0, and of the denoiser there."""
    first, last = (float(scheduler.alphas_cumprod[t].double()) for t in (999, 0))
    noise = randn_tensor((count, 3, size, size), generator=generators(0, 0, count))
    state = hills.flow(noise, first, last)
    image = (state - (1 - last) ** 0.5 * hills.noise(state, last)) / last**0.5
    return np.asarray((image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_it_is_the_flow_to_the_tolerance_given(
    hills_pipeline: Any, hills: Any, beta_schedule: str, prediction_type: str
) -> None:
    scheduler = DDIMScheduler(beta_schedule=beta_schedule, prediction_type=prediction_type)
    own = hills_pipeline(scheduler, hills)
    expected = exact(scheduler, hills, 2)
    errors, evaluations = [], []
    for tolerance in (1e-3, 1e-5):
        solved = solve_rk45(own, generators=generators(0, 0, 2), rtol=tolerance, atol=tolerance)
        errors.append(float(np.abs(solved.images - expected).max()))
        evaluations.append(solved.evaluations[0])
        assert sum(solved.evaluations) == len(own.unet.asked)
        own.unet.asked.clear()
    assert errors[1] < 3e-4 and errors[1] < errors[0] < 0.05
    assert evaluations[0] < evaluations[1] < 500


def test_image_k_depends_on_its_seed_alone(hills_pipeline: Any, hills: Any) -> None:
    own = hills_pipeline(DDIMScheduler(), hills)
    three = solve_rk45(own, generators=generators(5, 0, 3), rtol=1e-3, atol=1e-3)
    one = solve_rk45(own, generators=generators(7, 0, 1), rtol=1e-3, atol=1e-3)
    assert np.array_equal(three.images[2], one.images[0]) and three.evaluations[2] == one.evaluations[0]
    assert not np.array_equal(three.images[0], three.images[2])


def test_no_thread_is_left_whatever_ends_it(hills_pipeline: Any, hills: Any) -> None:
    own = hills_pipeline(DDIMScheduler(), hills)
    with pytest.raises(OctavoError, match="max_evaluations"):
        solve_rk45(own, generators=generators(0, 0, 1), max_evaluations=5)

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the network broke")

    own.unet.forward = broken
    with pytest.raises(RuntimeError, match="the network broke"):
        solve_rk45(own, generators=generators(0, 0, 1))
    assert not [thread for thread in threading.enumerate() if thread.name == "octavo-rk45"]


@pytest.mark.parametrize(("name", "value"), [("rtol", 0.0), ("atol", -1e-3), ("rtol", float("nan"))])
def test_tolerances_are_checked(hills_pipeline: Any, hills: Any, name: str, value: float) -> None:
    own = hills_pipeline(DDIMScheduler(), hills)
    with pytest.raises(OctavoError, match=f"{name}: .* is not above 0"):
        solve_rk45(own, generators=generators(0, 0, 1), **{name: value})

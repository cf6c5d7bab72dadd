from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from octavo.diffusion.trajectories import SPACINGS, evenly, spaced
from octavo.errors import OctavoError


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 50, 333, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_linear_spacings_are_diffusers(spacing: str, steps: int) -> None:
    theirs = DDIMScheduler(timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    if spacing == "linspace" and steps == 1:
        assert spaced(theirs, spacing, 1).timesteps == (999,)  # diffusers': 0, from pure noise
        return
    assert list(spaced(theirs, spacing, steps).timesteps) == theirs.timesteps.tolist()


def test_leading_has_the_schedulers_offset() -> None:
    scheduler = DDIMScheduler(steps_offset=1)
    scheduler.set_timesteps(50)
    assert list(spaced(scheduler, "linear", 50).timesteps) == scheduler.timesteps.tolist()


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.parametrize("name", ["karras", "beta"])
def test_noise_levels_are_diffusers(name: str) -> None:
    if name == "beta":
        pytest.importorskip("scipy")
    scheduler = EulerDiscreteScheduler(**{f"use_{name}_sigmas": True})
    scheduler.set_timesteps(10)
    theirs = np.round(scheduler.timesteps.numpy())
    assert np.abs(np.array(spaced(scheduler, name, 10).timesteps) - theirs).max() <= 1


def test_align_your_steps_is_the_table_at_ten_steps() -> None:
    tables = diffusers.schedulers.AysSchedules
    assert list(spaced(DDIMScheduler(), "ays_sd", 10).timesteps) == tables["StableDiffusionTimesteps"]
    assert list(spaced(DDIMScheduler(), "ays_sdxl", 10).timesteps) == tables["StableDiffusionXLTimesteps"]
    with pytest.raises(OctavoError, match="schedules of 1000 timesteps"):
        spaced(DDIMScheduler(num_train_timesteps=100), "ays_sd", 10)


@pytest.mark.parametrize("name", [name for name in SPACINGS if name != "beta"])
def test_every_number_of_steps_gives_as_many_timesteps(name: str) -> None:
    scheduler = DDIMScheduler()
    for steps in (1, 2, 3, 5, 20, 100, 997, 1000):
        assert spaced(scheduler, name, steps).num_steps == steps  # descending in range, or Trajectory raises


@pytest.mark.parametrize("name", [name for name in SPACINGS if name != "beta"])
def test_under_a_solver_that_jumps_to_0_itself_none_ends_there(name: str) -> None:
    scheduler = diffusers.DEISMultistepScheduler()
    for steps in (1, 2, 5, 100, 999):
        found = spaced(scheduler, name, steps)
        assert found.num_steps == steps and found.timesteps[-1] >= 1
    with pytest.raises(OctavoError, match="is not a whole number from 1 to 999"):
        spaced(scheduler, name, 1000)
    assert spaced(scheduler, "leading", 4).timesteps == (750, 500, 250, 1)


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.0, True])
def test_steps_out_of_range_are_told(steps: Any) -> None:
    with pytest.raises(OctavoError, match="is not a whole number from 1 to 1000"):
        spaced(DDIMScheduler(), "linear", steps)


def test_what_has_no_spacing_is_told() -> None:
    with pytest.raises(OctavoError, match="no spacing 'cubic'; choose one of linear"):
        spaced(DDIMScheduler(), "cubic", 5)
    with pytest.raises(OctavoError, match="FlowMatchEulerDiscreteScheduler has no alpha-bars"):
        spaced(FlowMatchEulerDiscreteScheduler(), "linear", 5)
    with pytest.raises(OctavoError, match="thresholding"):
        spaced(DDIMScheduler(thresholding=True), "linear", 5)


def test_candidates_have_both_ends() -> None:
    assert evenly(1000, 1) == (999,) and evenly(1000, 12)[0] == 0 and evenly(1000, 12)[-1] == 999
    assert evenly(1000, 5000) == tuple(range(1000))

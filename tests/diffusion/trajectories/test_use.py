from __future__ import annotations

from typing import Any

import pytest

from octavo.diffusion.exchange import same_scheduler
from octavo.diffusion.samplers import with_scheduler
from octavo.diffusion.trajectories import spaced, with_trajectory
from octavo.diffusion.trajectories.use import without_trajectory


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")
@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmsolver++", "unipc", "heun", "predictor_corrector"])
def test_a_trajectory_that_is_taken_away_leaves_the_scheduler_that_was(solver: str, pipeline: Any) -> None:
    own = with_scheduler(pipeline, solver)
    placed = with_trajectory(own, spaced(own.scheduler, "trailing", 3))
    again = without_trajectory(placed)
    assert same_scheduler(again, own) and not same_scheduler(placed, own)
    assert type(again) is type(own) and again.unet is own.unet
    again.scheduler.set_timesteps(7)
    assert placed.scheduler.config.trajectory, "the original is as it was"
    assert without_trajectory(own) is own

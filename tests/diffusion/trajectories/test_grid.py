from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from diffusers import DDIMScheduler

from octavo.diffusion.trajectories import grid as grid_module
from octavo.diffusion.trajectories import noise_schedule
from octavo.diffusion.trajectories.grid import cheapest_on_grid, check_grid, noise_grid
from octavo.diffusion.trajectories.jump_costs import JumpCosts
from octavo.errors import OctavoError


def random_costs(seed: int = 0, candidates: tuple[int, ...] = tuple(range(3, 123, 10))) -> JumpCosts:
    rng, count = np.random.default_rng(seed), len(candidates)
    return JumpCosts(candidates, rng.random((count + 1, count + 1)), rng.random(count), "elbo", 0)


@pytest.mark.parametrize("steps", [1, 2, 5, 6])
def test_all_trajectories_of_the_grid_are_ranked(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid_module, "CHUNK", 7)
    costs = random_costs()
    on_grid = costs.candidates[::2] + costs.candidates[1:4:2]
    every = {t: costs.cost(t) for t in combinations(sorted(on_grid, reverse=True), steps)}
    best = sorted(every, key=lambda timesteps: every[timesteps])[:5]
    ranked = cheapest_on_grid(costs, on_grid, steps, keep=5)
    assert list(ranked.timesteps) == best and ranked.tried == len(every)
    np.testing.assert_allclose(ranked.costs, [every[t] for t in best])


def test_on_all_candidates_it_finds_what_dynamic_programming_finds() -> None:
    for seed in range(5):
        costs = random_costs(seed)
        for steps in (1, 3, 6):
            (found,) = cheapest_on_grid(costs, costs.candidates, steps).timesteps
            assert found == costs.cheapest(steps)[0][-1]


def test_levels_are_those_that_the_mantissas_name() -> None:
    schedule = noise_schedule(DDIMScheduler())
    levels = (1 - schedule.alpha_bars) / schedule.alpha_bars
    grid = noise_grid(schedule, (1.0, 2.0, 5.0))
    assert list(grid) == sorted(set(grid))
    wanted = [m * 10.0**e for e in range(-4, 5) for m in (1, 2, 5)]
    wanted = [level for level in wanted if levels[0] <= level <= levels[-1]]
    assert len(grid) <= len(wanted)
    for level in wanted:  # each level has the timestep nearest to it, by ratio
        nearest = int(np.abs(np.log(levels / level)).argmin())
        assert nearest in grid


def test_the_grid_of_a_solver_that_jumps_to_0_itself_is_above() -> None:
    schedule = noise_schedule(DDIMScheduler(beta_start=9.9e-4))
    grid = noise_grid(schedule, [1.0])
    assert grid[0] == 0 and noise_grid(schedule, [1.0], lowest=1) == grid[1:]


def test_zero_terminal_snr_has_a_grid_too() -> None:
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert len(noise_grid(noise_schedule(scheduler))) > 10


def test_what_cannot_be_tried_is_told() -> None:
    grid = list(range(18))
    assert check_grid(grid, 6) == 18_564
    for steps in (0, 7, True):
        with pytest.raises(OctavoError, match=r"steps: .* method dp takes more"):
            check_grid(grid, steps)
    with pytest.raises(OctavoError, match="more than 20,000,000; give fewer mantissas"):
        check_grid(range(100), 6)
    schedule = noise_schedule(DDIMScheduler())
    with pytest.raises(OctavoError, match="mantissas: 10 is not at least 1 and below 10"):
        noise_grid(schedule, (10,))
    with pytest.raises(OctavoError, match="grid: 4 is not one of the 12 candidates"):
        cheapest_on_grid(random_costs(), [3, 4], 1)

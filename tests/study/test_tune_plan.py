from __future__ import annotations

from typing import Any

import pytest
from diffusers import DDIMScheduler, DDPMScheduler

from octavo.diffusion.samplers import with_scheduler
from octavo.diffusion.trajectories.eta import with_eta
from octavo.errors import OctavoError
from octavo.evaluation.trajectory_methods import SearchOptions
from octavo.study.tune_options import TuneOptions
from octavo.study.tune_plan import adds_noise, make_plan

# diffusers' DPM-Solver hands a torch tensor to NumPy, of which torch 2.13 and NumPy 2 together warn.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]


def options(**changes: Any) -> TuneOptions:
    own = {
        "solvers": ("ddim",),
        "spacings": ("trailing",),
        "steps": (4, 2),
        "search": SearchOptions(candidates=6),
    }
    return TuneOptions(**{**own, **changes})


def test_evaluations_are_those_of_the_solver_and_steps_ascend(pipeline: Any) -> None:
    plan = make_plan(pipeline, options(solvers=("ddim", "heun")))
    assert plan.evaluations == {("ddim", "trailing"): {2: 2, 4: 4}, ("heun", "trailing"): {2: 3, 4: 7}}
    assert [*plan.evaluations["ddim", "trailing"]] == [2, 4] and plan.left_out == ()


def test_what_does_not_fit_is_left_out_with_the_reason(pipeline: Any) -> None:
    plan = make_plan(
        pipeline, options(solvers=("ddim", "pndm"), spacings=("dp", "linspace"), steps=(3, 7, 8))
    )
    assert plan.evaluations == {("ddim", "dp"): {3: 3}, ("ddim", "linspace"): {3: 3, 7: 7, 8: 8}}
    dp, pndm = plan.left_out
    assert dp == "ddim, dp, 7 8 steps: steps: more than the 6 candidate timesteps of the search"
    assert pndm.startswith("pndm: scheduler: PNDMScheduler takes no timesteps of one's choice")


def test_where_nothing_fits_the_reasons_are_told(pipeline: Any) -> None:
    with pytest.raises(
        OctavoError, match=r"nothing of it can be tried \(ddim, dp, 7 steps: steps: more than the 6"
    ):
        make_plan(pipeline, options(spacings=("dp",), steps=(7,)))


def test_decibels_are_only_between_samplers_that_add_no_noise(pipeline: Any) -> None:
    plan = make_plan(pipeline, options(metric="psnr", solvers=("ddim", "ddpm", "dpmsolver++sde")))
    assert [*plan.evaluations] == [("ddim", "trailing")]
    assert all("adds noise on its way" in line for line in plan.left_out) and len(plan.left_out) == 2
    for name in ("ddpm", "dpmsolver++sde", "euler_ancestral", "predictor_corrector"):
        assert adds_noise(with_scheduler(pipeline, name).scheduler)
    for name in ("ddim", "dpmsolver++", "unipc", "heun", "euler"):
        assert not adds_noise(with_scheduler(pipeline, name).scheduler)
    assert adds_noise(DDPMScheduler()) and adds_noise(DDIMScheduler(), {"eta": 1.0})


def test_ddim_is_tried_with_an_eta_that_its_name_gives(pipeline: Any) -> None:
    plan = make_plan(pipeline, options(solvers=("ddim", "ddim:0.5")))
    assert [*plan.evaluations] == [("ddim", "trailing"), ("ddim:0.5", "trailing")]
    plan = make_plan(pipeline, options(solvers=("ddim", "ddim:0.5"), metric="psnr"))
    assert [*plan.evaluations] == [("ddim", "trailing")] and "ddim:0.5: adds noise" in plan.left_out[0]
    for name, message in {"ddim:5": "not a number from 0 to 1", "heun:0.5": "which only ddim has"}.items():
        with pytest.raises(OctavoError, match=f"^solvers: '{name}'.*{message}"):
            make_plan(pipeline, options(solvers=(name,)))
    assert adds_noise(with_eta(pipeline, 0.5).scheduler)
    assert not adds_noise(with_eta(pipeline, 0.5).scheduler, {"eta": 0.0})


@pytest.mark.parametrize("name", ["rk45", "Adaptive"])
def test_solvers_without_a_number_of_steps_are_refused(name: str, pipeline: Any) -> None:
    with pytest.raises(OctavoError, match=f"^solvers: {name} makes as many evaluations as each image takes"):
        make_plan(pipeline, options(solvers=("ddim", name)))


def test_steps_that_the_schedule_does_not_have_are_refused(pipeline: Any) -> None:
    with pytest.raises(
        OctavoError, match="steps: 1001 is not a number of steps from 1 to the schedule's 1000"
    ):
        make_plan(pipeline, options(steps=(3, 1001)))

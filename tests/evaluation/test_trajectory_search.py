from __future__ import annotations

import functools
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, PNDMScheduler

import octavo
from octavo.diffusion.samplers import with_scheduler
from octavo.diffusion.trajectories import noise_schedule, spaced
from octavo.diffusion.trajectories.eta import with_eta
from octavo.diffusion.trajectories.grid import noise_grid
from octavo.errors import OctavoError
from octavo.evaluation.features import Features
from octavo.evaluation.frechet import FeatureStatistics, frechet_distance
from octavo.evaluation.generate import generate, to_uint8
from octavo.evaluation.target import Target
from octavo.evaluation.trajectory_methods import STARTS, SearchOptions, chosen_objective, search_cost
from octavo.evaluation.trajectory_score import FrechetScore
from octavo.evaluation.trajectory_search import search_trajectory
from octavo.fingerprint import model_identity

QUICK = SearchOptions(candidates=8, images=2, fd_images=8, finalists=3, max_scores=9)


class Means:
    """Features that need no network: the mean of each colour."""

    name = "means"

    def __call__(self, images: Any) -> Features:
        return Features(torch.from_numpy(images.astype(np.float32).mean((1, 2))))


TARGET = Target(Means(), FeatureStatistics(torch.full((3,), 100.0).double(), torch.eye(3).double(), 50))


def searched(pipeline: Any, *args: Any, folder: Path, **settings: Any) -> octavo.Trajectory:
    settings = {"options": QUICK, "target": TARGET, **settings}
    return search_trajectory(pipeline, *args, workdir=folder, progress=False, batch_size=4, **settings)


@pytest.mark.parametrize(
    ("method", "objective"),
    [("dp", "trajectory"), ("dp", "elbo"), ("grid", "trajectory"), ("grid", "fd"), ("descent", "fd")],
)
def test_every_method_finds_a_trajectory_that_samples(
    method: str, objective: str, pipeline: Any, tmp_path: Path
) -> None:
    found = searched(pipeline, 3, method, objective, folder=tmp_path)
    assert (found.method, found.objective, found.num_steps) == (method, objective, 3)
    assert found.model == model_identity(pipeline.unet) and found.seed == 0
    assert found.alpha_bars == noise_schedule(pipeline.scheduler).digest and len(found.alpha_bars) == 9
    with pytest.raises(OctavoError, match="trajectory: is for another noise schedule"):
        octavo.with_trajectory(
            DDIMPipeline(pipeline.unet, DDIMScheduler(beta_schedule="squaredcos_cap_v2")), found
        )
    most = search_cost(pipeline.scheduler, 3, method, objective, QUICK)
    assert 0 < found.network_evaluations <= most
    if objective != "fd":
        assert found.network_evaluations == most
    images = generate(octavo.with_trajectory(pipeline, found), 2, steps=3, progress=False)
    assert np.isfinite(images).all()
    assert octavo.Trajectory.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_the_models_own_images_are_part_of_the_cost(pipeline: Any, tmp_path: Path) -> None:
    own = Target(Means(), None)  # type: ignore[arg-type]
    given, of_model = (
        searched(pipeline, 3, "grid", "fd", folder=tmp_path, target=target) for target in (TARGET, own)
    )
    assert of_model.network_evaluations == given.network_evaluations + 100 * QUICK.fd_images


def test_the_same_arguments_find_the_same_and_the_second_time_no_network_runs(
    pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = searched(pipeline, 3, "descent", folder=tmp_path)
    other = searched(pipeline, 3, "descent", folder=tmp_path / "elsewhere")
    assert first == other
    network = type(pipeline.unet)

    @functools.wraps(network.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the network runs")

    monkeypatch.setattr(network, "forward", forward)
    assert searched(pipeline, 3, "descent", folder=tmp_path) == first


def test_scores_to_data_of_equal_sums_are_not_taken_for_each_others(pipeline: Any, tmp_path: Path) -> None:
    """The mean's sum and the covariance's are those of TARGET; the distances are not."""
    moments = torch.tensor([120.0, 100.0, 80.0]).double(), torch.eye(3).double()
    other = Target(Means(), FeatureStatistics(*moments, 50))
    first = searched(pipeline, 2, "grid", "fd", folder=tmp_path)
    found = searched(pipeline, 2, "grid", "fd", folder=tmp_path, target=other)
    fresh = searched(pipeline, 2, "grid", "fd", folder=tmp_path / "fresh", target=other)
    assert found == fresh and found.facts["cost"] != first.facts["cost"]


def test_what_is_kept_takes_nothing_of_the_bar(pipeline: Any, tmp_path: Path, capsys: Any) -> None:
    settings = {"options": QUICK, "target": TARGET, "workdir": tmp_path, "batch_size": 4}
    search_trajectory(pipeline, 2, "grid", "fd", **settings)
    assert "FD, 2 steps: 100%" in capsys.readouterr().err
    search_trajectory(pipeline, 2, "grid", "fd", **settings)
    err = capsys.readouterr().err
    assert "FD, 2 steps: 0image" in err and not re.search(r"\d(image/s|s/image|evaluation/s)", err), "no rate"


def test_a_score_is_the_distance_of_the_images_sampled_there(pipeline: Any) -> None:
    score = FrechetScore(pipeline, Means(), TARGET.statistics, images=6, seed=5, batch_size=6)  # type: ignore[arg-type]
    value = score((900, 500, 100))
    own = octavo.Trajectory((900, 500, 100), 1000, "epsilon", "by hand")
    images = generate(
        octavo.with_trajectory(pipeline, own), 6, steps=3, seed=5 + (3 << 30), batch_size=6, progress=False
    )
    features = Means()(to_uint8(images)).pooled
    assert value == pytest.approx(frechet_distance(features, TARGET.statistics), rel=1e-9)  # type: ignore[arg-type]
    assert score.network_evaluations == 18


def test_a_descent_is_no_worse_than_any_of_its_starts(pipeline: Any, tmp_path: Path) -> None:
    options = SearchOptions(candidates=8, images=2, fd_images=8, max_scores=20)
    found = searched(pipeline, 3, "descent", folder=tmp_path, options=options)
    starts = found.facts["starts"]
    assert set(starts) >= {"leading", "quadratic", "karras", "dp elbo", "dp trajectory"}
    assert found.facts["cost"] <= min(starts.values()) and found.facts["scores"] <= 20
    score = FrechetScore(pipeline, Means(), TARGET.statistics, images=8, batch_size=4)  # type: ignore[arg-type]
    assert score(found.timesteps) == pytest.approx(found.facts["cost"])
    assert score(spaced(pipeline.scheduler, "karras", 3).timesteps) == pytest.approx(starts["karras"])


def test_a_descent_starts_without_beta_where_scipy_is_not_at_hand(
    pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("scipy", "scipy.stats"):
        monkeypatch.setitem(sys.modules, module, None)
    found = searched(pipeline, 3, "descent", folder=tmp_path)
    assert set(found.facts["starts"]) == {*STARTS, "dp elbo", "dp trajectory"} - {"beta"}


def test_fewer_scores_than_a_descent_starts_from_are_told_before_anything_is_measured(
    pipeline: Any, tmp_path: Path
) -> None:
    options = SearchOptions(candidates=8, images=2, fd_images=8, max_scores=6)
    with pytest.raises(OctavoError, match=r"max_scores: 6 are fewer than the [78] trajectories that"):
        searched(pipeline, 3, "descent", folder=tmp_path, options=options)
    assert not list(tmp_path.iterdir())


def test_a_grid_searched_by_fd_says_that_it_was_screened(pipeline: Any, tmp_path: Path) -> None:
    found = searched(pipeline, 2, "grid", "fd", folder=tmp_path)
    grid = noise_grid(noise_schedule(pipeline.scheduler))
    assert set(found.timesteps) <= set(grid) and found.facts["grid"] == list(grid)
    assert found.facts["finalists"] == 3 and 1 <= found.facts["rank_by_it"] <= 3
    assert "heuristic" in found.facts["screened_by"]
    assert found.facts["tried"] == len(grid) * (len(grid) - 1) // 2


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")
@pytest.mark.parametrize(
    ("method", "objective"), [("dp", "elbo"), ("grid", "fd"), ("descent", "fd"), ("linear", None)]
)
def test_what_is_searched_for_deis_ends_above_the_timestep_that_it_jumps_to(
    method: str, objective: str | None, pipeline: Any, tmp_path: Path
) -> None:
    own = with_scheduler(pipeline, "deis")
    found = searched(own, 3, method, objective, folder=tmp_path)
    assert found.timesteps[-1] >= 1
    images = generate(octavo.with_trajectory(own, found), 2, steps=3, progress=False)
    assert np.isfinite(images).all()


def test_without_real_data_the_models_own_fine_images_are_the_target(
    pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo.evaluation.trajectory_search.REFERENCE_STEPS", 6)
    own = Target(Means(), None)
    found = searched(pipeline, 2, "grid", "fd", folder=tmp_path, target=own)
    assert found.facts["cost"] >= 0 and own.of_model
    told = {
        (known, size): search_cost(pipeline.scheduler, 2, "grid", "fd", QUICK, known, size)
        for known in (True, False)
        for size in (4, 5)
    }
    assert told[False, 4] - told[True, 4] == 100 * 8
    assert told[False, 5] - told[True, 5] == 100 * 10, "its last batch is whole"


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")
@pytest.mark.parametrize("solver", ["heun", "predictor_corrector"])
def test_every_evaluation_of_a_solver_that_makes_more_than_one_a_step_is_told(
    solver: str, pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    for module in ("trajectory_search", "trajectory_methods"):
        monkeypatch.setattr(f"octavo.evaluation.{module}.REFERENCE_STEPS", 6)
    own, made = with_scheduler(pipeline, solver), []
    network = type(pipeline.unet)
    original = network.forward

    @functools.wraps(original)
    def counted(self: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(len(sample))
        return original(self, sample, *args, **kwargs)

    monkeypatch.setattr(network, "forward", counted)
    settings = {"options": QUICK, "workdir": tmp_path / "work", "progress": False, "batch_size": 3}
    found = search_trajectory(own, 3, "grid", "fd", target=Target(Means(), None), **settings)
    assert found.network_evaluations == sum(made)
    assert search_cost(own.scheduler, 3, "grid", "fd", QUICK, False, 3) == sum(made)
    kept: list[int] = []
    made.clear()
    again = search_trajectory(
        own, 3, "grid", "fd", target=Target(Means(), None), on_kept=kept.append, **settings
    )
    assert again == found and not made and sum(kept) == found.network_evaluations


def test_a_trajectory_that_the_model_visits_already_is_not_its_reference(
    pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo.evaluation.trajectory_search.REFERENCE_STEPS", 6)
    placed = octavo.with_trajectory(pipeline, spaced(pipeline.scheduler, "trailing", 3))
    own = Target(Means(), None)
    found, again = (
        searched(one, 2, "grid", "fd", target=own, folder=tmp_path / name)
        for name, one in (("plain", pipeline), ("placed", placed))
    )
    assert found.timesteps == again.timesteps and found.facts["cost"] == again.facts["cost"]


def test_a_quantized_pipeline_is_searched_in_its_integers(
    quantized: Any, pipeline: Any, tmp_path: Path
) -> None:
    fast = octavo.accelerate(quantized, precision="f32", batch_size=4)
    found = searched(fast, 3, "dp", folder=tmp_path)
    assert found.facts["runtime"][0] == "openvino"
    assert octavo.with_trajectory(pipeline, found).scheduler.config.trajectory == list(found.timesteps)
    in_float = searched(pipeline, 3, "dp", folder=tmp_path)
    assert in_float.facts["cost"] != found.facts["cost"]


def test_a_spacing_costs_nothing(pipeline: Any, tmp_path: Path) -> None:
    found = searched(pipeline, 4, "leading", folder=tmp_path)
    assert found == spaced(pipeline.scheduler, "leading", 4)
    assert not list(tmp_path.iterdir())


def test_damaged_scores_are_told(pipeline: Any, tmp_path: Path) -> None:
    searched(pipeline, 2, "grid", "fd", folder=tmp_path)
    (path,) = tmp_path.rglob("scores.json")
    path.write_text('{"1 0": "low"}')
    with pytest.raises(OctavoError, match=r"scores\.json: not readable as scores"):
        searched(pipeline, 2, "grid", "fd", folder=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((3, "dpp"), "method: 'dpp' is not one of dp, grid, descent, linear"),
        ((3, "dp", "fd"), "objective: 'fd' is no sum over jumps"),
        (
            (3, "dp", "psnr"),
            "objective: 'psnr' is not one of trajectory, elbo, fd|objective: 'psnr' is not one of elbo",
        ),
        ((3, "descent", "elbo"), "objective: descent is for fd; dp finds the optimum of elbo"),
        ((3, "karras", "fd"), "objective: karras is a spacing"),
        ((0, "dp"), "steps: 0 is not a whole number from 1 to 1000"),
        ((9, "dp"), "steps: 9 is more than the 8 candidate timesteps"),
        ((7, "grid"), "steps: 7 is not a whole number from 1 to 6"),
        (
            (3, "dp", None, {"seed": 2_000_000_000}),
            "seed: 2000000000 is not a whole number from 0 to 1073741",
        ),
        ((3, "grid", "fd", {"seed": 10**9}), "seed: 1000000000 is not a whole number from 0 to 805306"),
        (
            (3, "dp", None, {"options": SearchOptions(candidates=1001)}),
            "candidates: 1001 is not a whole number from 2 to 1000",
        ),
    ],
)
def test_what_cannot_be_searched_is_told(
    arguments: tuple[Any, ...], told: str, pipeline: Any, tmp_path: Path
) -> None:
    settings = dict(arguments[3]) if len(arguments) > 3 else {}
    with pytest.raises(OctavoError, match=told):
        searched(pipeline, *arguments[:3], folder=tmp_path, **settings)
    assert not list(tmp_path.iterdir())


def test_a_scheduler_that_takes_no_timesteps_is_told_before_anything_runs(
    pipeline: Any, tmp_path: Path
) -> None:
    other = with_scheduler(pipeline, "DDIMScheduler")
    other.scheduler = PNDMScheduler()
    with pytest.raises(OctavoError, match="PNDMScheduler takes no timesteps of one's choice"):
        searched(other, 3, folder=tmp_path)
    with pytest.raises(OctavoError, match="PNDMScheduler takes no timesteps of one's choice"):
        search_cost(other.scheduler, 3, "grid", "fd", QUICK)
    with pytest.raises(OctavoError, match="target: is needed for the objective fd"):
        searched(pipeline, 3, "descent", folder=tmp_path, target=None)
    assert not list(tmp_path.iterdir())


def test_options_out_of_range_are_told() -> None:
    for settings, told in (
        ({"candidates": 1}, "candidates: 1 is not at least 2"),
        ({"fd_images": 7}, "fd_images: 7 is not at least 8"),
        ({"max_scores": 0}, "max_scores: 0 is not at least 1"),
    ):
        with pytest.raises(OctavoError, match=told):
            SearchOptions(**settings)  # type: ignore[arg-type]
    assert chosen_objective("grid", None) == "trajectory"
    assert search_cost(DDIMScheduler(), 5, "descent", None, SearchOptions()) == 6400 + 9664 + 80 * 512 * 5


@pytest.mark.parametrize("method", ["grid", "descent"])
def test_fd_is_searched_with_the_eta_given_and_the_trajectory_keeps_it(
    method: str, pipeline: Any, tmp_path: Path
) -> None:
    found = searched(pipeline, 3, method, "fd", folder=tmp_path, eta=0.8)
    assert found.eta == 0.8 and octavo.Trajectory.from_dict(found.to_dict()) == found
    quiet = searched(pipeline, 3, method, "fd", folder=tmp_path)
    assert quiet.eta is None and quiet.facts["cost"] != found.facts["cost"]
    by_input = searched(pipeline, 3, method, "fd", folder=tmp_path, inputs={"eta": 0.8})
    by_scheduler = searched(with_eta(pipeline, 0.8), 3, method, "fd", folder=tmp_path)
    assert by_input == found and by_scheduler.to_dict() == found.to_dict()
    score = FrechetScore(with_eta(pipeline, 0.8), TARGET.extractor, TARGET.statistics, images=8, batch_size=4)
    assert score(found.timesteps) == found.facts["cost"]


def test_an_eta_that_the_objective_knows_nothing_of_is_refused(pipeline: Any, tmp_path: Path) -> None:
    for method, objective in (("dp", "trajectory"), ("dp", "elbo"), ("grid", "trajectory")):
        with pytest.raises(
            OctavoError, match=f"eta: the costs that objective {objective} adds up are of DDIM"
        ):
            searched(pipeline, 3, method, objective, folder=tmp_path, eta=0.5)
    assert not list(tmp_path.iterdir())
    holding = with_eta(pipeline, 0.5)
    found = searched(holding, 3, "dp", folder=tmp_path)
    assert found == searched(pipeline, 3, "dp", folder=tmp_path) and found.eta is None
    assert len(list(tmp_path.iterdir())) == 1, "one table of costs for every eta"
    spacing = searched(pipeline, 3, "linear", folder=tmp_path, eta=0.5)
    assert spacing.eta == 0.5 and searched(holding, 3, "linear", folder=tmp_path) == spacing
    with pytest.raises(OctavoError, match=r"eta: 0\.5, but the inputs have 0\.2"):
        searched(pipeline, 3, "linear", folder=tmp_path, eta=0.5, inputs={"eta": 0.2})
    with pytest.raises(OctavoError, match="eta: is DDIM's, and DDPMScheduler has none"):
        searched(with_scheduler(pipeline, "ddpm"), 3, "linear", folder=tmp_path, eta=0.5)

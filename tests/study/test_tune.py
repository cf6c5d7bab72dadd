from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DiffusionPipeline

from octavo.cli import main
from octavo.diffusion.reuse import ReusePlan
from octavo.diffusion.samplers import with_scheduler
from octavo.diffusion.trajectories import spaced, with_trajectory
from octavo.diffusion.trajectories.eta import held_eta
from octavo.errors import OctavoError
from octavo.evaluation.features import Features
from octavo.evaluation.frechet import FeatureStatistics
from octavo.evaluation.target import Target
from octavo.evaluation.trajectory_methods import SearchOptions
from octavo.quantization import ranges
from octavo.study import tune_networks
from octavo.study.tune import tune
from octavo.study.tune_networks import make_networks
from octavo.study.tune_options import Goal, TuneOptions
from octavo.study.tune_report import tune_text
from octavo.study.tune_search import Choice, Curve, best_within, fastest, most_asked, pareto_front
from octavo.study.tune_verify import Verification

# diffusers' DPM-Solver hands a torch tensor to NumPy, of which torch 2.13 and NumPy 2 together warn.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]
LADDER = (3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50)


def monotone_curves(seed: int) -> tuple[list[list[Choice]], dict[Choice, float]]:
    """Curves whose badness falls with steps, each by its own law."""
    rng = np.random.default_rng(seed)
    curves, badness = [], {}
    for index in range(6):
        per_step, scale, floor = rng.uniform(0.01, 0.03), rng.uniform(20, 200), rng.uniform(0, 6)
        curve = [Choice(Curve(f"r{index}", "ddim", "dp"), k, k * per_step) for k in LADDER]
        curves.append(curve)
        badness |= {choice: floor + scale / choice.steps**1.5 for choice in curve}
    return curves, badness


@pytest.mark.parametrize("seed", range(8))
def test_the_fastest_good_choice_of_monotone_curves_is_found_by_few_questions(seed: int) -> None:
    curves, badness = monotone_curves(seed)
    asked: list[Choice] = []

    def is_good(choice: Choice) -> bool:
        asked.append(choice)
        return badness[choice] <= 5.0

    found = fastest(curves, is_good)
    good = [choice for curve in curves for choice in curve if badness[choice] <= 5.0]
    assert (found is None) == (not good)
    if found is not None:
        assert found.seconds == min(choice.seconds for choice in good) and badness[found] <= 5.0
    assert len(asked) <= len(curves) * (1 + math.ceil(math.log2(len(LADDER))))


@pytest.mark.parametrize("seed", range(8))
def test_what_a_curve_costs_at_most_is_never_exceeded_and_once_met(seed: int) -> None:
    costs = np.random.default_rng(seed).integers(1, 50, size=1 + seed).tolist()
    curve = [Choice(Curve("r", "ddim", "dp"), k, float(k)) for k in range(1, 1 + len(costs))]
    spent = []
    for length in range(1, 1 + len(curve)):
        for least in range(1, 1 + length):
            asked: set[int] = set()
            fastest([curve[:length]], lambda choice: asked.add(choice.steps) or choice.steps >= least)  # noqa: B023
            spent.append(sum(costs[steps - 1] for steps in asked))
    assert max(spent) == most_asked(costs)


def test_before_each_curve_it_is_told_what_may_still_be_asked() -> None:
    curves, badness = monotone_curves(3)
    told: list[list[list[Choice]]] = []
    fastest(curves, lambda choice: badness[choice] <= 5.0, told.append)
    assert [len(left) for left in told] == sorted((len(left) for left in told), reverse=True)
    assert len(told) == len(curves) and sum(map(len, told[0])) == len(curves) * len(LADDER)


def test_within_a_time_each_curve_is_asked_once() -> None:
    curves, badness = monotone_curves(1)
    asked: list[Choice] = []

    def score(choice: Choice) -> float:
        asked.append(choice)
        return badness[choice]

    found = best_within(curves, 0.3, score)
    fitting = [choice for curve in curves for choice in curve if choice.seconds <= 0.3]
    assert found is not None and badness[found] == min(badness[choice] for choice in fitting)
    assert len({choice.curve for choice in asked}) == len(asked) <= len(curves)
    assert best_within(curves, 0.001, score) is None


def test_nothing_on_the_front_is_beaten() -> None:
    curves, badness = monotone_curves(2)
    scored = [(choice, badness[choice]) for curve in curves for choice in curve]
    front = pareto_front(scored)
    for choice, value in front:
        assert not any(c.seconds <= choice.seconds and b < value for c, b in scored)
    for choice, value in scored:
        assert any(c.seconds <= choice.seconds and b <= value for c, b in front)


class Means:
    name = "means"

    def __call__(self, images: Any) -> Features:
        return Features(torch.from_numpy(images.astype(np.float32).mean((1, 2))))


TARGET = Target(Means(), FeatureStatistics(torch.full((3,), 120.0).double(), torch.eye(3).double(), 50))
QUICK = TuneOptions(
    recipes=("ptq4dm",),
    spacings=("dp", "trailing"),
    steps=(2, 3, 5),
    num_images=8,
    verify_images=8,
    reference_steps=6,
    search=SearchOptions(candidates=6, images=2),
)
CALIBRATION = {"samples": 4, "steps": 2}


@pytest.fixture(scope="module")
def work(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The networks, quantized and timed once for all tests."""
    folder = tmp_path_factory.mktemp("work")
    settings = {"inputs": None, "search": QUICK.search, "progress": False}
    make_networks(
        pipeline, ("ptq4dm", "float"), folder, calibration=CALIBRATION, seed=0, batch_size=4, **settings
    )
    return folder


def tuned(pipeline: Any, goal: str, out: Path, work: Path | None = None, **settings: Any) -> dict[str, Any]:
    settings = {"options": QUICK, "target": TARGET, "calibration": CALIBRATION, **settings}
    if work is not None:
        shutil.copytree(work, out / "work")
    return tune(pipeline, Goal.of(goal), out, **{"batch_size": 4, "progress": False, **settings})


def test_the_winner_is_a_pipeline_that_plain_diffusers_loads(
    pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tuned(pipeline, "quality=1e9", tmp_path)
    assert results["winner"]["steps"] == 2 and results["winner"]["recipe"] == "ptq4dm"
    assert json.loads((tmp_path / "tune.json").read_text()) == results
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert isinstance(loaded, type(pipeline)) or type(loaded).__name__ == "DDPMPipeline"
    assert loaded.scheduler.config.trajectory == results["winner"]["timesteps"]
    images = loaded(num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 8, 8, 3) and np.isfinite(images).all()
    verified = results["verification"]
    assert verified["difference"]["value"] == pytest.approx(
        verified["fd"]["value"] - verified["fd_reference"]["value"]
    )
    # again: nothing is quantized, timed, sampled or scored a second time
    monkeypatch.setattr("octavo.evaluation.shards.sample", None)
    monkeypatch.setattr("octavo.study.tune_networks.calibrate", None)
    monkeypatch.setattr("octavo.study.tune_networks.take_turns", None)
    monkeypatch.setattr("octavo.study.tune_quality.Quality._measure", None)
    assert tuned(pipeline, "quality=1e9", tmp_path) == results


def test_a_latency_takes_the_most_steps_that_fit(pipeline: Any, work: Path, tmp_path: Path) -> None:
    results = tuned(pipeline, "latency=1000", tmp_path, work)
    assert {row["steps"] for row in results["scored"]} == {5}
    assert len(results["scored"]) == 6  # three solvers, two spacings
    least = min(row["fd"] for row in results["scored"])
    assert results["winner"]["fd"] == least and results["front"][-1]["fd"] == least


def test_the_winners_folder_holds_the_eta_that_it_was_chosen_with(
    pipeline: Any, work: Path, tmp_path: Path
) -> None:
    options = TuneOptions(
        **{**vars(QUICK), "recipes": ("float",), "solvers": ("ddim:0.9",), "spacings": ("trailing",)}
    )
    results = tuned(pipeline, "latency=1000", tmp_path, work, options=options)
    assert results["winner"]["solver"] == "ddim:0.9"
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert held_eta(loaded.scheduler) == 0.9
    with pytest.raises(
        OctavoError, match=r"eta: is DDIM's alone; name it with the solver \(--solvers ddim:0\.5"
    ):
        tuned(pipeline, "latency=1000", tmp_path / "else", inputs={"eta": 0.5})


def test_the_references_own_quality_may_be_the_bar(pipeline: Any, work: Path, tmp_path: Path) -> None:
    far = Target(Means(), FeatureStatistics(torch.full((3,), 1e4).double(), torch.eye(3).double(), 50))
    results = tuned(pipeline, "quality=reference", tmp_path, work, target=far)
    assert results["winner"]["fd"] <= results["bar"] == results["reference"]["fd"]
    assert results["reference"]["steps"] == 6


def test_psnr_to_the_reference(pipeline: Any, work: Path, tmp_path: Path) -> None:
    options = TuneOptions(**{**vars(QUICK), "metric": "psnr", "spacings": ("trailing",)})
    results = tuned(pipeline, "quality=1", tmp_path, work, options=options, target=None)
    assert results["winner"]["psnr"] >= 1 and results["verification"] is None
    with pytest.raises(OctavoError, match="nothing reaches it; the nearest is"):
        tuned(pipeline, "quality=99", tmp_path, options=options, target=None)


FLOAT_ONLY = TuneOptions(
    **{**vars(QUICK), "recipes": ("float",), "solvers": ("ddim",), "spacings": ("trailing",)}
)


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled, which for so small a network is quicker; ranges are searched coarsely."""
    monkeypatch.setattr(tune_networks, "accelerate", lambda pipeline, **settings: pipeline)
    monkeypatch.setattr(ranges, "CANDIDATES", 5)


def verdicts(monkeypatch: pytest.MonkeyPatch, verified: dict[int, bool], distances: dict[int, float]) -> None:
    """Verifications by number of steps, made up."""

    def told(self: Any, pipeline: Any, steps: int, evaluations: int) -> dict[str, Any]:
        estimate = {"value": distances[steps], "low": 0.5, "high": 9.0, "method": ""}
        return {
            "num_images": 8,
            "fd": estimate,
            "fd_reference": estimate,
            "difference": estimate,
            "reference_steps": 6,
            "verified": verified[steps],
        }

    monkeypatch.setattr(Verification, "__call__", told)


def test_a_winner_that_does_not_hold_on_other_images_gives_way_to_the_next_slower(
    pipeline: Any, tmp_path: Path, by_torch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    distances = {2: 3.0, 3: 2.0, 5: 4.0}
    verdicts(monkeypatch, {2: False, 3: True}, distances)
    results = tuned(pipeline, "quality=1e9", tmp_path, options=FLOAT_ONLY)
    assert results["winner"]["steps"] == 3 and results["verified"] is True
    assert [row["steps"] for row in results["rejected"]] == [2]
    written = DiffusionPipeline.from_pretrained(tmp_path / "pipeline").scheduler.config.trajectory
    assert written == results["winner"]["timesteps"] and len(written) == 3
    text = tune_text(results)
    assert "not held on other images: float, ddim, trailing, 2 steps, at FD 3 (0.5 to 9)" in text
    assert "NOT VERIFIED" not in text
    assert "not excluded" not in text, "9 is far below what was asked for"
    verdicts(monkeypatch, {2: False, 3: False, 5: False}, distances)
    results = tuned(pipeline, "quality=1e9", tmp_path, options=FLOAT_ONLY)
    assert results["verified"] is False and results["winner"]["steps"] == 3, "the one with the least FD"
    assert "NOT VERIFIED: the winner is at FD 2 (0.5 to 9), asked 1e+09; none of the 3" in tune_text(results)
    relative = {**results, "goal": {"kind": "quality", "value": None}}
    assert "NOT VERIFIED: the winner is worse than full precision by 2 (0.5 to 9)" in tune_text(relative)


def test_how_much_worse_the_winner_may_still_be_is_told(
    pipeline: Any, tmp_path: Path, by_torch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few the images, "verified" alone says nothing of what they leave open."""
    verdicts(monkeypatch, {2: True}, {2: 3.0})
    results = tuned(pipeline, "quality=1e9", tmp_path, options=FLOAT_ONLY)
    relative = {**results, "goal": {"kind": "quality", "value": None}}
    told = "not excluded at 97.5 %: an FD above full precision's by up to 9, 300 % of that; more"
    assert told in tune_text(relative)
    near = {**results, "goal": {"kind": "quality", "value": 5.0}}
    assert "not excluded at 97.5 %: an FD of up to 9, asked 5; more --verify-images" in tune_text(near)
    better = {**results["verification"], "difference": {"value": -2.0, "low": -3.0, "high": -1.0}}
    assert "not excluded" not in tune_text({**relative, "verification": better})


def test_a_model_that_visits_a_trajectory_is_tuned_as_without_it(
    pipeline: Any, tmp_path: Path, by_torch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed = with_trajectory(pipeline, spaced(pipeline.scheduler, "trailing", 3))
    options = TuneOptions(**{**vars(FLOAT_ONLY), "recipes": ("ptq4dm",)})
    results = tuned(placed, "quality=1e9", tmp_path, options=options)
    assert results["reference_steps"] == 6
    monkeypatch.setattr(tune_networks, "calibrate", None)
    assert tuned(pipeline, "quality=1e9", tmp_path, options=options) == results


def test_the_cost_is_told_before_counted_and_shown_as_one_bar(
    pipeline: Any, tmp_path: Path, by_torch: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from octavo.evaluation import shards

    evaluated, real = [], shards.sample

    def counted(pipeline: Any, first: int, count: int, *, steps: int, **settings: Any) -> Any:
        evaluated.append(count * steps)  # DDIM evaluates once a step
        return real(pipeline, first, count, steps=steps, **settings)

    monkeypatch.setattr(shards, "sample", counted)
    results = tuned(pipeline, "quality=1e9", tmp_path, options=FLOAT_ONLY, progress=True)
    most, made = (results["network_evaluations"][name] for name in ("at_most", "made"))
    # 8 images each: scores of 5, 3 and 2 steps, three verifications of at most 5, the reference in 6;
    # 11 rounds of a batch of 4
    assert most == {
        "calibration": 0,
        "timing": 44,
        "search": 0,
        "reference": 0,
        "scores": 80,
        "verification": 8 * (3 * 5 + 6),
    }
    assert all(made[kind] <= most[kind] for kind in most)
    assert made["reference"] + made["scores"] + made["verification"] == sum(evaluated)
    err = capsys.readouterr().err
    assert "tune: at most 292 evaluations of the network, one for each image: 44 for the times, 80" in err
    assert "float, ddim, trailing, 5 steps" in err and "tune: 100%" in err


def test_decibels_are_to_a_reference_that_adds_no_noise(
    pipeline: Any, tmp_path: Path, by_torch: None
) -> None:
    options = TuneOptions(**{**vars(FLOAT_ONLY), "metric": "psnr", "solvers": ("ddim", "ddpm")})
    results = tuned(with_scheduler(pipeline, "ddpm"), "quality=1", tmp_path, options=options, target=None)
    assert results["reference_solver"] == "DDIMScheduler" and results["verified"] is None
    assert [line.split(":")[0] for line in results["left_out"]] == ["ddpm"]
    text = tune_text(results)
    assert "dB to full precision in 6 steps of DDIMScheduler" in text and "left out: ddpm: adds noise" in text


@pytest.mark.parametrize(
    ("goal", "settings", "told"),
    [
        ("quality=8", {"target": None}, "target: the metric fd needs real images"),
        (
            "quality=8",
            {"options": TuneOptions(solvers=("ddim", "unpic"))},
            "solvers: 'unpic' is neither ddim",
        ),
        (
            "quality=8",
            {"options": TuneOptions(solvers=("rk45",))},
            "solvers: rk45 makes as many evaluations as each image takes",
        ),
        (
            "quality=8",
            {"options": TuneOptions(solvers=("pndm",))},
            "PNDMScheduler takes no timesteps of one's",
        ),
        (
            "quality=8",
            {"options": TuneOptions(spacings=("dp",), steps=(7,), search=QUICK.search)},
            "7 steps: steps: more than the 6 candidate timesteps",
        ),
        ("quality=8", {"calibration": {"samples": 0}}, "samples"),
        (
            "quality=8",
            {"options": TuneOptions(reference_steps=1001)},
            "reference_steps: 1001 is more than the 1000",
        ),
    ],
)
def test_what_cannot_be_tuned_is_told_before_anything_is_made(
    goal: str, settings: dict[str, Any], told: str, pipeline: Any, tmp_path: Path
) -> None:
    with pytest.raises(OctavoError, match=told):
        tuned(pipeline, goal, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"recipes": ("best", "bset")}, "recipes: 'bset' is not one of ptq4dm, best, w4a8, float"),
        ({"spacings": ("karas",)}, "spacings: 'karas' is not one of dp, linear"),
        ({"steps": (5, 0)}, "steps: 0 is not a whole number from 1"),
        ({"steps": (-3,)}, "steps: -3 is not a whole number from 1"),
        ({"metric": "fid"}, "metric: 'fid' is not one of fd, psnr"),
    ],
)
def test_a_name_or_number_that_cannot_be_is_told_at_once(options: dict[str, Any], told: str) -> None:
    with pytest.raises(OctavoError, match=told):
        TuneOptions(**options)


@pytest.mark.parametrize(
    "text", ["quality", "quality=", "quality=nan", "latency=-1", "latency=reference", "fd=3"]
)
def test_a_goal_that_is_none_is_told(text: str) -> None:
    with pytest.raises(OctavoError, match="is not quality=NUMBER, quality=reference or latency=SECONDS"):
        Goal.of(text)


def test_the_command(pipeline: Any, tmp_path: Path, capsys: Any) -> None:
    pipeline.save_pretrained(tmp_path / "tiny")
    arguments = ["tune", str(tmp_path / "tiny"), "--target", "latency=1000", "--out", str(tmp_path / "tuned")]
    arguments += ["--metric", "psnr", "--recipes", "ptq4dm", "--solvers", "ddim", "--spacings", "leading"]
    arguments += ["--steps", "2,4", "--num-images", "8", "--reference-steps", "4", "--samples", "4"]
    arguments += ["--calibration-steps", "2", "--batch-size", "4"]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, err = capsys.readouterr()
    assert not stop.value.code, err
    assert (
        "winner: ptq4dm, ddim, leading, 4 steps" in out and f"pipeline: {tmp_path / 'tuned/pipeline'}" in out
    )
    assert isinstance(DDIMPipeline.from_pretrained(tmp_path / "tuned/pipeline"), DDIMPipeline)
    assert (tmp_path / "tuned/front.svg").read_text().startswith("<svg")
    chosen, plan = str(tmp_path / "tuned/pipeline"), str(tmp_path / "reuse.json")
    picture = ["--num-images", "2", "--out", str(tmp_path / "grid.png")]
    for command in (
        ["reuse", chosen, "--recompute", "2", "--num-images", "2", "--out", plan],
        ["sample", chosen, "--reuse", plan, *picture],
    ):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert not stop.value.code, capsys.readouterr().err
    assert ReusePlan.load(plan).num_steps == 4 and (tmp_path / "grid.png").is_file()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*arguments[:-2], "--target", "speed=3"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("octavo: target: 'speed=3' is not quality=NUMBER")

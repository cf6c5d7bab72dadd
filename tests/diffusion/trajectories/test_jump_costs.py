from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from octavo.diffusion import generators
from octavo.diffusion.trajectories import jump_costs
from octavo.diffusion.trajectories.elbo import EIGHT_BITS, ElboErrors, elbo_jumps, measure_elbo
from octavo.diffusion.trajectories.jump_costs import OBJECTIVES, cost_of_measuring, measure_jump_costs
from octavo.diffusion.trajectories.reference import measure_reference, reference_jumps
from octavo.diffusion.trajectories.schedule import noise_schedule
from octavo.diffusion.trajectories.visit import visit
from octavo.errors import OctavoError


def twelve(**settings: Any) -> DDIMScheduler:
    """A schedule of 12 timesteps, from almost no noise to almost nothing else."""
    return DDIMScheduler(num_train_timesteps=12, beta_start=0.01, beta_end=0.6, **settings)


def measured(pipeline: Any, objective: str, folder: Path, **settings: Any) -> jump_costs.JumpCosts:
    return measure_jump_costs(
        pipeline, objective, workdir=folder, progress=False, **{"images": 6, "batch_size": 4, **settings}
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_of_twelve_timesteps_the_cheapest_of_all_are_found(
    objective: str, ddpm: Callable[[Any], Any], tmp_path: Path
) -> None:
    costs = measured(ddpm(twelve()), objective, tmp_path)
    assert costs.candidates == tuple(range(12))
    cheapest, values = costs.cheapest(12)
    for steps in range(1, 13):
        every = {t[::-1]: costs.cost(t[::-1]) for t in combinations(range(12), steps)}
        best = min(every, key=lambda timesteps: every[timesteps])
        assert cheapest[steps - 1] == best
        assert values[steps - 1] == pytest.approx(every[best])


def test_a_likelihood_jump_is_the_divergence_of_the_two_posteriors(
    normal_pipeline: Callable[..., Any],
) -> None:
    """Against DDPM's own posterior (2006.11239, equations 6 and 7), and its variance, written out."""
    scheduler = twelve(clip_sample=False)
    pipeline, schedule = normal_pipeline(scheduler, mean=0.3, deviation=0.5), noise_schedule(scheduler)
    images = 0.3 + 0.5 * torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    errors = measure_elbo(pipeline, schedule, range(12), images, generators=generators(7, 0, 64))
    jumps, start = elbo_jumps(errors, schedule, range(12))
    abar, dims = schedule.alpha_bars, 3 * 8 * 8
    expected = dims * 0.25 * (1 - abar) / (abar * 0.25 + 1 - abar)  # the posterior variance of x_0, exact
    np.testing.assert_allclose(errors.errors / 64, expected, rtol=0.06)
    for t in range(1, 12):
        for s in range(t):
            alpha = abar[t] / abar[s]
            of_image = abar[s] ** 0.5 * (1 - alpha) / (1 - abar[t])
            variance = (1 - abar[s]) / (1 - abar[t]) * (1 - alpha)
            divergence = of_image**2 * errors.errors[t] / 64 / (2 * variance)
            assert jumps[1 + s, 1 + t] == pytest.approx(divergence, rel=1e-9)
    of_noise = torch.distributions.Normal(0.0, 1.0)
    for t in (0, 5, 11):
        own = torch.distributions.Normal(abar[t] ** 0.5 * images.double(), (1 - abar[t]) ** 0.5)
        divergence = torch.distributions.kl_divergence(own, of_noise).sum() / 64
        assert start[t] == pytest.approx(float(divergence))
    log_likelihood = torch.distributions.Normal(0.0, (expected[4] / dims) ** 0.5).log_prob(
        (expected[4] / dims) ** 0.5 * torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    )
    assert jumps[0, 5] == pytest.approx(-dims * float(log_likelihood.mean()), rel=0.1)


def test_the_last_jumps_variance_is_not_less_than_that_of_rounding() -> None:
    """Against a normal density, written out: below the floor too, where the smaller error still is the likelier."""
    schedule, dims = noise_schedule(twelve()), 192
    sizes = EIGHT_BITS * np.array([0.0, 0.01, 0.3, 0.999, 1.001, 4.0, 100.0, *[1000.0] * 5])
    errors = ElboErrors(2 * dims * sizes, norm=1.0, images=2, dims=dims)
    found = elbo_jumps(errors, schedule, range(12))[0][0, 1:]
    for size, cost in zip(sizes, found, strict=True):
        density = torch.distributions.Normal(0.0, max(size, EIGHT_BITS) ** 0.5)
        log_likelihood = density.log_prob(torch.tensor(size).double().sqrt())
        assert cost == pytest.approx(-dims * float(log_likelihood), rel=1e-5)
    assert (np.diff(found[:8]) > 0).all()


def test_a_reference_jump_is_the_distance_of_ddims_jump(ddpm: Callable[[Any], Any]) -> None:
    """Every jump made one by one along the reference, where the costs come of products of all with all."""
    scheduler = twelve(set_alpha_to_one=False)
    pipeline, schedule = ddpm(scheduler), noise_schedule(scheduler)
    candidates = [0, 2, 3, 6, 9, 11]
    states: dict[int, Tensor] = {}
    halves: dict[int, tuple[Tensor, Tensor]] = {}

    def on_prediction(index: int, prediction: Tensor, state: Tensor) -> Tensor:
        t = candidates[::-1][index]
        states[t], halves[t] = state, schedule.split(prediction, state, t)
        following = candidates[::-1][index + 1] if index < 5 else None
        states[-1] = schedule.jump(*halves[t], following)
        return states[-1]

    visit(pipeline, candidates[::-1], on_prediction, generators=generators(1, 0, 2))
    errors = measure_reference(pipeline, schedule, candidates, generators=generators(1, 0, 2))
    jumps, start = reference_jumps(errors, schedule, candidates)
    variance = float(states[-1].double().var(correction=0))
    for j, t in enumerate(candidates):
        for i, s in enumerate([-1, *candidates[:j]]):
            abar = schedule.alpha_bars[s] if i else schedule.final_alpha_bar
            weight = variance / (abar * variance + 1 - abar)
            jumped = schedule.jump(*halves[t], s if i else None)
            distance = float((jumped.double() - states[s]).square().mean())
            assert jumps[i, 1 + j] == pytest.approx(weight * distance, abs=1e-5 * max(1.0, variance))
        far = float((states[t].double() - states[11]).square().mean())
        abar = schedule.alpha_bars[t]
        assert start[j] == pytest.approx(variance / (abar * variance + 1 - abar) * far, rel=1e-4, abs=1e-6)


def test_the_distance_of_exact_normal_data_is_that_of_its_flow(
    normal_pipeline: Callable[..., Any], tmp_path: Path
) -> None:
    """N(0, c^2): a jump scales the state by a known factor, the flow by another; the error is their difference."""
    scheduler = DDIMScheduler(clip_sample=False)
    costs = measured(normal_pipeline(scheduler, deviation=0.5), "trajectory", tmp_path, candidates=1000)
    abar = noise_schedule(scheduler).alpha_bars
    spread = np.sqrt(abar * 0.25 + 1 - abar)
    t, s = 800, 300
    posterior = 0.25 * abar[t] ** 0.5 / spread[t] ** 2, (1 - abar[t]) ** 0.5 / spread[t] ** 2
    factor = abar[s] ** 0.5 * posterior[0] + (1 - abar[s]) ** 0.5 * posterior[1]
    error = (factor - spread[s] / spread[t]) ** 2 * spread[t] ** 2 * 0.25 / spread[s] ** 2
    assert costs.jumps[1 + s, 1 + t] == pytest.approx(error, rel=0.15)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_was_killed_goes_on_and_ends_the_same(
    objective: str, ddpm: Callable[[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = ddpm(twelve())
    whole = measured(pipeline, objective, tmp_path / "whole")
    assert whole.network_evaluations == cost_of_measuring(objective, 12, 6, 12)
    name, saved = "octavo.diffusion.trajectories.jump_costs._save", jump_costs._save

    def killed_after_one(path: Path, errors: Any) -> None:
        saved(path, errors)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(name, killed_after_one)
        measured(pipeline, objective, tmp_path / "killed")
    assert len(list((tmp_path / "killed").rglob("*.safetensors"))) == 1
    calls: list[int] = []
    network = type(pipeline.unet)
    original = network.forward

    def counted(self: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(sample))
        return original(self, sample, *args, **kwargs)

    monkeypatch.setattr(network, "forward", counted)
    kept: list[int] = []
    again = measured(pipeline, objective, tmp_path / "killed", on_kept=kept.append)
    assert kept == [cost_of_measuring(objective, 12, 4, 12)]
    assert sum(calls) == cost_of_measuring(objective, 12, 2, 12)  # the second batch alone
    assert np.array_equal(again.jumps, whole.jumps) and np.array_equal(again.start, whole.start)


def test_images_are_the_same_in_any_batches_and_others_with_another_seed(
    ddpm: Callable[[Any], Any], tmp_path: Path
) -> None:
    pipeline = ddpm(twelve())
    first, second = (measured(pipeline, "trajectory", tmp_path, batch_size=b).jumps for b in (6, 2))
    np.testing.assert_allclose(first, second, rtol=1e-3, atol=1e-5)
    assert not np.allclose(first, measured(pipeline, "trajectory", tmp_path, seed=100).jumps, rtol=1e-3)


def test_a_damaged_file_is_named(ddpm: Callable[[Any], Any], tmp_path: Path) -> None:
    pipeline = ddpm(twelve())
    measured(pipeline, "elbo", tmp_path)
    path = sorted(tmp_path.rglob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(OctavoError, match=r"errors-000004\.safetensors: not readable as measured errors"):
        measured(pipeline, "elbo", tmp_path)


def test_bad_arguments_are_told_before_anything_runs(ddpm: Callable[[Any], Any], tmp_path: Path) -> None:
    pipeline = ddpm(twelve())
    for settings, message in (
        ({"images": 1}, "images: 1 is not a whole number from 2"),
        ({"candidates": 13}, "candidates: 13 is not a whole number from 2 to 12"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"seed": 2_000_000_000}, "seed: 2000000000 is not a whole number from 0 to 1073741818"),
    ):
        with pytest.raises(OctavoError, match=message):
            measured(pipeline, "elbo", tmp_path, **settings)
    with pytest.raises(OctavoError, match="objective: 'fd' is no sum over jumps"):
        measured(pipeline, "fd", tmp_path)
    with pytest.raises(OctavoError, match="has no alpha-bars"):
        measured(ddpm(FlowMatchEulerDiscreteScheduler()), "elbo", tmp_path)
    assert not list(tmp_path.iterdir())


def test_more_candidates_than_a_clipped_reference_bears_are_warned_of(
    ddpm: Callable[[Any], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def told(objective: str, candidates: int, **settings: Any) -> list[str]:
        caplog.clear()
        own = {"images": 2, "batch_size": 2, "candidates": candidates}
        measured(ddpm(DDIMScheduler(**settings)), objective, tmp_path, **own)
        return caplog.messages

    assert told("trajectory", 201) == [
        "candidates: 201 are more than 200, and the sampler clips predicted images: so fine a reference is a worse "
        "one; give fewer"
    ]
    assert not told("trajectory", 200)
    assert not told("elbo", 201) and not told("trajectory", 201, clip_sample=False)


def test_predictions_that_are_not_finite_are_told(ddpm: Callable[[Any], Any], tmp_path: Path) -> None:
    pipeline = ddpm(twelve(clip_sample=False))
    torch.nn.init.constant_(pipeline.unet.conv_out.bias, float("nan"))
    with pytest.raises(OctavoError, match="unet: its predictions are not finite"):
        measured(pipeline, "trajectory", tmp_path)

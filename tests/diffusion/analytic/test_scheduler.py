from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline

import octavo
from octavo.diffusion import call_pipeline, generators
from octavo.diffusion.analytic import AnalyticScheduler, trajectory_variances
from octavo.diffusion.analytic.scheduler import AnalyticTrajectoryScheduler
from octavo.diffusion.trajectories import Trajectory, noise_schedule, steps_of, with_trajectory
from octavo.diffusion.trajectories.bound import plain_name, visited_by
from octavo.errors import OctavoError

NOTHING_UNKNOWN: dict[str, Any] = {"gamma_timesteps": [0, 999], "gamma": [1.0, 1.0], "last_noise": None}
UNEVEN = [950, 600, 300, 120, 20]
ALPHA_BARS = noise_schedule(DDPMScheduler()).alpha_bars


def of_normal(variance: float = 0.25, **settings: Any) -> dict[str, Any]:
    """Gamma of normal data at three timesteps, which tell that of all."""
    timesteps = [0, 400, 999]
    abar = ALPHA_BARS[timesteps]
    gamma = (1 - abar) / (abar * variance + 1 - abar)
    return {"gamma_timesteps": timesteps, "gamma": gamma.tolist(), **settings}


def walk(scheduler: Any, count: int, *, channels: int = 1, **kwargs: Any) -> list[torch.Tensor]:
    """Every state of a run in which the network's outputs are noise."""
    draw = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(count)
    state = torch.randn(2, 1, 4, 4, generator=draw)
    states = [state]
    for t in scheduler.timesteps:
        output = torch.randn(2, 1, 4, 4, generator=draw)
        output = torch.cat([output] * channels, dim=1)
        state = scheduler.step(output, t, state, **kwargs).prev_sample
        states.append(state)
    return states


def of_images() -> dict[str, Any]:
    return {"generator": [torch.Generator().manual_seed(5 + k) for k in range(2)]}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"steps_offset": 1, "clip_sample": False},
        {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear"},
        {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2", "clip_sample_range": 0.5},
        {"trained_betas": np.linspace(1e-4, 0.02, 1000).tolist()},
    ],
)
def test_where_nothing_is_unknown_it_is_ddpm_and_ddim(config: dict[str, Any]) -> None:
    """With Gamma = 1 the variances are betatilde and 0, and the noise is drawn as DDPM draws it."""
    ours = walk(AnalyticScheduler(**config, **NOTHING_UNKNOWN), 10, **of_images())
    theirs = walk(DDPMScheduler(**config), 10, **of_images())
    for state, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(state, other, rtol=1e-4, atol=1e-4)
    ours = walk(AnalyticScheduler(**config, kind="ddim", **NOTHING_UNKNOWN), 10, **of_images())
    for state, other in zip(ours, walk(DDIMScheduler(**config), 10), strict=True):
        torch.testing.assert_close(state, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_four_steps_make_normal_data_with_the_right_spread_everywhere(
    kind: str, normal_pipeline: Callable[..., Any]
) -> None:
    """Reversing normal data in a few steps is exact with optimal variances; DDPM's own are off by far."""
    steps = [999, 700, 350, 100]

    def spreads(scheduler: Any) -> list[float]:
        network = normal_pipeline(DDPMScheduler(clip_sample=False), mean=0.3, deviation=0.5).unet
        scheduler.set_timesteps(4) if visited_by(scheduler) else scheduler.set_timesteps(timesteps=steps)
        draw = torch.Generator().manual_seed(0)
        abar = float(ALPHA_BARS[999])
        state = abar**0.5 * 0.3 + (abar * 0.25 + 1 - abar) ** 0.5 * torch.randn(64, 3, 32, 32, generator=draw)
        found = []
        for t in scheduler.timesteps:
            predicted = network(state, t).sample.detach()
            state = scheduler.step(predicted, t, state, generator=draw).prev_sample
            found.append(float(state.var()))
        return found

    settings = of_normal(kind=kind, clip_sample=False, last_noise=None)
    ours = spreads(AnalyticTrajectoryScheduler(**settings, trajectory=steps))
    abar = ALPHA_BARS[steps]
    exact = abar * 0.25 + 1 - abar
    np.testing.assert_allclose(ours[:-1], exact[1:], rtol=0.02)
    # the last jump takes the mean of x_0 given x_100
    assert ours[-1] == pytest.approx(abar[-1] * 0.25**2 / exact[-1], rel=0.02)
    for variance_type in ("fixed_small", "fixed_large"):
        default = spreads(DDPMScheduler(clip_sample=False, variance_type=variance_type))
        assert max(np.abs(default[:-1] / exact[1:] - 1)) > 0.1


def test_variances_are_those_of_the_timesteps_set() -> None:
    scheduler = AnalyticScheduler(**of_normal(0.25), kind="ddim")
    for steps in (4, 10):
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps.tolist()
        abar = ALPHA_BARS[timesteps]
        gamma = (1 - abar) / (abar * 0.25 + 1 - abar)
        expected = trajectory_variances(ALPHA_BARS, timesteps, gamma, "ddim")
        np.testing.assert_allclose(scheduler.variances(), expected, rtol=1e-6)
    free = AnalyticScheduler(**of_normal(0.25, last_noise=None, largest_variance=0.01))
    free.set_timesteps(4)
    abar = ALPHA_BARS[free.timesteps.tolist()]
    expected = trajectory_variances(
        ALPHA_BARS, free.timesteps.tolist(), np.zeros(4), largest=0.01, last_noise=None
    )
    assert free.variances()[0] == pytest.approx(expected[0])  # at t = 750 the bound decides


def test_image_k_depends_on_its_own_generator(ddpm: Callable[[Any], Any]) -> None:
    pipeline = ddpm(AnalyticScheduler(**of_normal()))
    both = call_pipeline(pipeline, generators=generators(3, 0, 2), num_inference_steps=4)
    second = call_pipeline(pipeline, generators=generators(3, 1, 1), num_inference_steps=4)
    np.testing.assert_allclose(both[1], second[0], atol=1e-5)
    assert np.abs(both[0] - both[1]).max() > 0.1


def test_the_second_half_of_a_networks_channels_is_not_looked_at_and_dtypes_stay() -> None:
    scheduler = AnalyticScheduler(**of_normal())
    one, two = walk(scheduler, 4, **of_images()), walk(scheduler, 4, channels=2, **of_images())
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    scheduler.set_timesteps(4)
    state = torch.ones(1, 1, 2, 2, dtype=torch.bfloat16)
    following, image = scheduler.step(
        state, scheduler.timesteps[0], state, torch.Generator(), return_dict=False
    )
    assert following.dtype == image.dtype == torch.bfloat16


def test_without_set_timesteps_it_visits_all() -> None:
    scheduler = AnalyticScheduler(num_train_timesteps=12, gamma_timesteps=[0, 11], gamma=[0.5, 0.9])
    state = torch.ones(1, 1, 2, 2)
    assert scheduler.step(state, 11, state, torch.Generator()).prev_sample.isfinite().all()
    assert scheduler.variances().shape == (12,)


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_a_saved_pipeline_loads_with_plain_diffusers(kind: str, unet: Any, tmp_path: Path) -> None:
    pipeline = DDPMPipeline(unet, AnalyticScheduler(**of_normal(), kind=kind, beta_start=2e-4))
    pipeline.save_pretrained(tmp_path)
    for loader in (DiffusionPipeline.from_pretrained, DDPMPipeline.from_pretrained, octavo.load):
        loaded = loader(tmp_path)
        assert type(loaded.scheduler) is AnalyticScheduler and type(loaded) is DDPMPipeline
        assert dict(loaded.scheduler.config) | {"_use_default_values": 0} == dict(
            pipeline.scheduler.config
        ) | {"_use_default_values": 0}
        first, second = (
            call_pipeline(p, generators=generators(0, 0, 2), num_inference_steps=3)
            for p in (pipeline, loaded)
        )
        assert np.array_equal(first, second)


def test_it_visits_a_trajectory_and_keeps_it_when_saved(unet: Any, tmp_path: Path) -> None:
    plain = DDPMPipeline(unet, AnalyticScheduler(**of_normal(), kind="ddim"))
    pipeline = with_trajectory(plain, Trajectory(tuple(UNEVEN), 1000, "epsilon", "by hand"))
    assert type(pipeline.scheduler) is AnalyticTrajectoryScheduler and steps_of(pipeline, 50) == 5
    assert plain_name(pipeline.scheduler) == "AnalyticScheduler"
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert visited_by(loaded.scheduler) == tuple(UNEVEN) and loaded.scheduler.config.kind == "ddim"
    first, second = (
        call_pipeline(p, generators=generators(0, 0, 2), num_inference_steps=5) for p in (pipeline, loaded)
    )
    assert np.array_equal(first, second)
    assert loaded.scheduler.timesteps.tolist() == UNEVEN
    abar = ALPHA_BARS[UNEVEN]
    gamma = (1 - abar) / (abar * 0.25 + 1 - abar)
    expected = trajectory_variances(ALPHA_BARS, UNEVEN, gamma, "ddim")
    np.testing.assert_allclose(loaded.scheduler.variances(), expected, rtol=1e-6)
    with pytest.raises(OctavoError, match="a trajectory of 5 steps; give 5"):
        loaded(num_inference_steps=4, generator=torch.Generator())


def test_on_evenly_spaced_timesteps_a_trajectory_is_the_count(unet: Any) -> None:
    plain = DDPMPipeline(unet, AnalyticScheduler(**of_normal()))
    plain.scheduler.set_timesteps(4)
    even = Trajectory(tuple(plain.scheduler.timesteps.tolist()), 1000, "epsilon", "leading")
    first, second = (
        call_pipeline(p, generators=generators(0, 0, 2), num_inference_steps=4)
        for p in (plain, with_trajectory(plain, even))
    )
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "timesteps are not a list of at least one"),
        (of_normal(kind="sde"), "kind: 'sde' is not one of ddpm, ddim"),
        (of_normal(last_noise=-1), "last_noise: -1 is not a number from 0"),
        (of_normal(largest_variance=None), "largest_variance: None is not a number from 0"),
        (of_normal(gamma=[0.5]), "gamma: has 1 values for 3 timesteps"),
        (of_normal(thresholding=True), "thresholding is not supported"),
    ],
)
def test_settings_that_cannot_be_are_told(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(OctavoError, match=told):
        AnalyticScheduler(**settings)


def test_a_timestep_that_is_not_set_is_told() -> None:
    scheduler = AnalyticScheduler(**of_normal())
    scheduler.set_timesteps(4)
    with pytest.raises(OctavoError, match="timestep: 7 is not one of those that are set"):
        scheduler.step(torch.zeros(1, 1, 2, 2), 7, torch.zeros(1, 1, 2, 2))


def test_a_ddim_pipeline_would_lose_it_and_is_not_made(unet: Any) -> None:
    """Why `with_analytic_variance` makes a DDPMPipeline: diffusers' DDIMPipeline makes its scheduler anew."""
    pipeline = DDIMPipeline(unet, AnalyticScheduler(**of_normal()))
    assert type(pipeline.scheduler) is DDIMScheduler

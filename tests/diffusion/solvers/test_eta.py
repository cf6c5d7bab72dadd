from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DiffusionPipeline, StableDiffusionPipeline

import octavo
from octavo.diffusion import call_pipeline, generators
from octavo.diffusion.exchange import same_scheduler
from octavo.diffusion.samplers import with_scheduler
from octavo.diffusion.solvers.eta import DDIMEtaScheduler
from octavo.diffusion.trajectories import Trajectory, spaced, with_trajectory
from octavo.diffusion.trajectories.eta import held_eta, with_eta
from octavo.errors import OctavoError


def seeds() -> list[torch.Generator]:
    return generators(0, 0, 2)


def plain_call(pipeline: Any, steps: int = 4, **inputs: Any) -> np.ndarray:
    """As anybody calls it, without Octavo's own way of running pipelines."""
    return np.asarray(
        pipeline(
            batch_size=2, generator=seeds(), num_inference_steps=steps, output_type="np", **inputs
        ).images
    )


def ours(pipeline: Any, steps: int = 4, **inputs: Any) -> np.ndarray:
    return np.asarray(call_pipeline(pipeline, generators=seeds(), num_inference_steps=steps, inputs=inputs))


@pytest.mark.parametrize("on_trajectory", [False, True])
@pytest.mark.parametrize("kind", [DDIMPipeline, DDPMPipeline])
def test_a_folder_samples_with_the_eta_that_it_holds(
    kind: Any, on_trajectory: bool, unet: Any, tmp_path: Path, told_by_diffusers: Any
) -> None:
    original: Any = DDIMPipeline(unet, DDIMScheduler())
    pipeline: Any = kind(unet, DDIMScheduler())
    if on_trajectory:
        found = spaced(original.scheduler, "quadratic", 4)
        original, pipeline = with_trajectory(original, found), with_trajectory(pipeline, found)
    wanted = plain_call(original, eta=0.6)
    with_eta(pipeline, 0.6).save_pretrained(tmp_path / "folder")
    loaded: Any = DiffusionPipeline.from_pretrained(tmp_path / "folder")
    assert type(loaded) is kind and held_eta(loaded.scheduler) == 0.6
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(plain_call(loaded), wanted), "the pipeline's own call, told of no eta"
    assert np.array_equal(ours(loaded), wanted)
    assert not told_by_diffusers.records
    assert not np.array_equal(plain_call(original), wanted)


def test_what_a_call_is_given_goes_before_what_the_scheduler_holds(unet: Any) -> None:
    plain: Any = DDIMPipeline(unet, DDIMScheduler())
    holding: Any = with_eta(plain, 0.6)
    for eta in (0.0, 0.3, 1.0):
        assert np.array_equal(ours(holding, eta=eta), ours(plain, eta=eta))
    assert np.array_equal(plain_call(holding, eta=0.3), plain_call(plain, eta=0.3))
    # diffusers hands on its default, 0, asked for or not
    assert np.array_equal(plain_call(holding, eta=0.0), plain_call(plain, eta=0.6))
    for again in (with_eta(holding, 0.0), with_scheduler(holding, "ddim")):
        assert type(again.scheduler) is DDIMScheduler and "eta" not in again.scheduler.config
        assert np.array_equal(plain_call(again), plain_call(plain))
    both = [with_scheduler(pipeline, "ddim:0.5") for pipeline in (plain, holding)]
    assert same_scheduler(*both) and not same_scheduler(plain, holding)
    assert held_eta(plain.scheduler) is None and held_eta(holding.scheduler) == 0.6
    assert with_eta(holding, 0.6) is holding and with_eta(plain, 0) is plain


def test_a_trajectory_brings_its_eta(unet: Any) -> None:
    plain: Any = DDIMPipeline(unet, DDIMScheduler())
    timesteps = (900, 500, 200, 10)
    with_noise, without, silent = (
        Trajectory(timesteps, 1000, "epsilon", "by hand", eta=eta) for eta in (0.5, 0.0, None)
    )
    wanted = ours(with_trajectory(plain, silent), eta=0.5)
    assert np.array_equal(ours(with_trajectory(plain, with_noise)), wanted)
    holding = with_eta(plain, 0.9)
    assert np.array_equal(ours(with_trajectory(holding, with_noise)), wanted)
    assert type(with_trajectory(holding, without).scheduler).__name__ == "DDIMTrajectoryScheduler"
    assert held_eta(with_trajectory(holding, silent).scheduler) == 0.9
    assert Trajectory.from_dict(with_noise.to_dict()) == with_noise and "eta 0.5" in str(with_noise)
    state = silent.to_dict()
    del state["eta"]  # of a file from before
    assert Trajectory.from_dict(state) == silent
    with pytest.raises(OctavoError, match=r"trajectory: was made with an eta of 0\.5, DDIM's, which DDPM"):
        with_trajectory(with_scheduler(plain, "ddpm"), with_noise)
    with_trajectory(with_scheduler(plain, "ddpm"), without)
    with pytest.raises(OctavoError, match="trajectory: eta: 2 is not a number from 0 to 1"):
        Trajectory(timesteps, 1000, "epsilon", "by hand", eta=2)


def test_a_solver_is_named_with_its_eta(unet: Any) -> None:
    plain: Any = DDIMPipeline(unet, DDIMScheduler())
    assert held_eta(with_scheduler(plain, "ddim:0.25").scheduler) == 0.25
    for name, message in {
        "ddim:2": r"eta: 2\.0 is not a number from 0 to 1",
        "ddim:much": "eta: 'much' is not a number",
        "unipc:0.5": "gives unipc an eta, which only ddim has",
    }.items():
        with pytest.raises(OctavoError, match=message):
            with_scheduler(plain, name)
    with pytest.raises(OctavoError, match="eta: True is not a number from 0 to 1"):
        with_eta(plain, True)
    assert octavo.DDIMEtaScheduler is DDIMEtaScheduler


def test_stable_diffusion_hands_on_an_eta_of_0_too() -> None:
    """What the setting is made for: its call takes eta, 0 by default, and hands it to every step."""
    import inspect

    assert inspect.signature(StableDiffusionPipeline.__call__).parameters["eta"].default == 0.0
    pipeline: Any = object.__new__(StableDiffusionPipeline)
    pipeline.scheduler = DDIMEtaScheduler(eta=0.5)
    extra = StableDiffusionPipeline.prepare_extra_step_kwargs(pipeline, None, 0.0)
    assert extra["eta"] == 0.0 and pipeline.scheduler.eta_of_step(extra["eta"]) == 0.5

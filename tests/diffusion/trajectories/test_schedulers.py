from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline

import octavo
from octavo.diffusion import call_pipeline, first_call, generators
from octavo.diffusion.samplers import SOLVERS, with_scheduler
from octavo.diffusion.trajectories import Trajectory, spaced, steps_of, with_trajectory
from octavo.diffusion.trajectories.bound import plain_config, plain_name, visited_by
from octavo.diffusion.trajectories.schedulers import ADAPTERS
from octavo.errors import OctavoError
from octavo.fingerprint import model_identity, pipeline_fingerprint, same_model

# diffusers' DPM-Solver hands a torch tensor to NumPy, of which torch 2.13 and NumPy 2 together warn; its DEIS too.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]
NOISY = (
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerAncestralDiscreteUnconditionalScheduler",
    "PredictorCorrectorScheduler",
)
UNEVEN = [950, 600, 300, 120, 20]
PNDM = "PNDMScheduler takes no timesteps of one's choice; ddim, ddpm, .*, euler_ancestral, predictor_corrector do"


def trajectory(timesteps: Any = UNEVEN, **changes: Any) -> Trajectory:
    return Trajectory(tuple(timesteps), 1000, "epsilon", "by hand", **changes)


def own_class(name: str) -> Any:
    """The class that the adapter of this name adds a trajectory to: diffusers' own, or ours."""
    return getattr(diffusers, name, None) or getattr(octavo, name)


def sampled(pipeline: Any, steps: int, inputs: Any = None) -> np.ndarray:
    return call_pipeline(
        pipeline, generators=generators(0, 0, 2), num_inference_steps=steps, inputs=inputs or {}
    )


def walk(scheduler: Any, count: int, seed: int = 0, **kwargs: Any) -> list[torch.Tensor]:
    """Every state of a run in which the network's outputs are noise."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(count)
    state = torch.randn(2, 1, 4, 4, generator=generator) * scheduler.init_noise_sigma
    states = [state]
    for t in scheduler.timesteps:
        scheduler.scale_model_input(state, t)
        output = torch.randn(2, 1, 4, 4, generator=generator)
        state = scheduler.step(output, t, state, **kwargs).prev_sample
        states.append(state)
    return states


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"timestep_spacing": "trailing"},
        {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False},
        {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear"},
        {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        {"thresholding": True},
        {"trained_betas": np.linspace(1e-4, 0.02, 1000).tolist()},
    ],
)
def test_ddim_on_its_own_timesteps_is_ddim_bit_for_bit(config: dict[str, Any], eta: float) -> None:
    plain = DDIMScheduler(**config)
    plain.set_timesteps(10)
    ours = ADAPTERS["DDIMScheduler"].from_config(plain_config(plain), trajectory=plain.timesteps.tolist())
    generator = [torch.Generator().manual_seed(5) for _ in range(2)]
    theirs = walk(plain, 10, eta=eta, generator=generator[0])
    for state, other in zip(walk(ours, 10, eta=eta, generator=generator[1]), theirs, strict=True):
        # NaN too: diffusers' own with eta 1 from a zero terminal SNR
        torch.testing.assert_close(state, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim_on_uneven_timesteps_is_the_papers_formula(eta: float) -> None:
    ours = ADAPTERS["DDIMScheduler"](trajectory=UNEVEN, clip_sample=False)
    states = walk(ours, 5, eta=eta, generator=torch.Generator().manual_seed(5))
    alpha_bars = ours.alphas_cumprod.double()
    draw, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(5)
    x = torch.randn(2, 1, 4, 4, generator=draw).double()
    for i, t in enumerate(UNEVEN):
        eps = torch.randn(2, 1, 4, 4, generator=draw).double()
        now, then = alpha_bars[t], alpha_bars[UNEVEN[i + 1]] if i < 4 else torch.tensor(1.0).double()
        sigma = eta * ((1 - then) / (1 - now)).sqrt() * (1 - now / then).sqrt()
        x = then.sqrt() * (x - (1 - now).sqrt() * eps) / now.sqrt() + (1 - then - sigma**2).sqrt() * eps
        if eta:
            x = x + sigma * torch.randn(2, 1, 4, 4, generator=noise).double()
        torch.testing.assert_close(states[i + 1].double(), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_on_its_own_timesteps_each_solver_is_diffusers(name: str) -> None:
    settings = {"timestep_spacing": "leading", "steps_offset": 1}  # whole timesteps, and none at 0 (DEIS)
    plain = own_class(name)(**settings)
    plain.set_timesteps(5)
    timesteps = list(dict.fromkeys(int(t) for t in plain.timesteps))  # Heun has most of them twice
    ours = ADAPTERS[name](trajectory=timesteps, **settings)
    generator = [{"generator": torch.Generator().manual_seed(5)} if name in NOISY else {} for _ in range(2)]
    theirs = walk(plain, 5, **generator[0])
    states = walk(ours, 5, **generator[1])
    assert ours.timesteps.tolist() == plain.timesteps.tolist() and ours.num_inference_steps == 5
    assert ours.timesteps.dtype == plain.timesteps.dtype
    for state, other in zip(states, theirs, strict=True):
        torch.testing.assert_close(state, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_each_solver_goes_to_the_noise_levels_asked_for(name: str) -> None:
    ours = ADAPTERS[name](trajectory=UNEVEN)
    ours.set_timesteps(5)
    assert list(dict.fromkeys(int(t) for t in ours.timesteps)) == UNEVEN
    generator = {"generator": torch.Generator().manual_seed(5)} if name in NOISY else {}
    assert all(state.isfinite().all() for state in walk(ours, 5, **generator))
    if hasattr(ours, "sigmas"):
        alpha_bars = ours.alphas_cumprod[UNEVEN].double()
        levels = list(dict.fromkeys(ours.sigmas.tolist()))[:5]
        assert levels == pytest.approx(((1 - alpha_bars) / alpha_bars).sqrt().tolist(), rel=1e-5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm_adds_no_noise_to_the_finished_image_wherever_its_trajectory_ends(variance: str) -> None:
    ours = ADAPTERS["DDPMScheduler"](trajectory=[600, 300, 71], variance_type=variance)
    ours.set_timesteps(3)
    draw = torch.Generator().manual_seed(0)
    state = torch.randn(2, 1, 16, 16, generator=draw)
    output = torch.randn(2, 2 if variance == "learned_range" else 1, 16, 16, generator=draw)
    own = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    before = [generator.get_state() for generator in own]
    last = ours.step(output, 71, state, generator=own)
    assert torch.equal(last.prev_sample, last.pred_original_sample)
    both = ours.step(output, 71, state, generator=own, return_dict=False)
    assert all(torch.equal(one, last.prev_sample) for one in both)
    assert all(torch.equal(one.get_state(), was) for one, was in zip(own, before, strict=True))
    earlier = ours.step(output, 300, state, generator=own)
    assert not torch.equal(own[0].get_state(), before[0]), "noise is for all but the last"
    plain = DDPMScheduler(variance_type=variance)
    plain.set_timesteps(timesteps=[600, 300, 71])
    again = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    assert torch.equal(plain.step(output, 300, state, generator=again).prev_sample, earlier.prev_sample)


def test_images_from_before_a_scheduler_was_mended_are_not_taken_for_its_own(
    unet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mended = with_trajectory(DDPMPipeline(unet, DDPMScheduler()), trajectory())
    name = pipeline_fingerprint(mended, [], {})
    monkeypatch.setattr(ADAPTERS["DDPMScheduler"], "revision", 0)
    assert pipeline_fingerprint(mended, [], {}) != name


@pytest.mark.parametrize("name", [name for name in sorted(ADAPTERS) if name not in NOISY])
def test_each_solver_of_the_flow_solves_the_gaussian_toy(name: str) -> None:
    """Where the data are N(0, 1) each, eps = sqrt(1 - abar) x, and the flow keeps x as it is."""
    steps = 40
    timesteps = list(spaced(DDIMScheduler(), "karras", steps).timesteps[:-1])
    ours = ADAPTERS[name](trajectory=timesteps, **({"clip_sample": False} if name.startswith("DDIM") else {}))
    ours.set_timesteps(len(timesteps))
    start = torch.linspace(-2, 2, 16).reshape(1, 1, 4, 4)
    scaled = ours.init_noise_sigma != 1
    state = start * ours.init_noise_sigma
    for t in ours.timesteps:
        abar = ours.alphas_cumprod[int(t)]
        model_input = ours.scale_model_input(state, t)
        state = ours.step((1 - abar).sqrt() * model_input, t, state).prev_sample
    assert scaled == (name.startswith(("Euler", "Heun")) and "Unconditional" not in name)
    assert (state - start).abs().max() < 0.15  # of 2


def test_a_pipeline_samples_the_same_on_the_linear_trajectory(unet: Any) -> None:
    pipeline = DDIMPipeline(unet, DDIMScheduler())
    ours = with_trajectory(pipeline, spaced(pipeline.scheduler, "linear", 4))
    for inputs in ({}, {"eta": 0.8}):
        assert np.array_equal(sampled(pipeline, 4, inputs), sampled(ours, 4, inputs))
    assert type(pipeline.scheduler) is DDIMScheduler and type(ours) is DDIMPipeline


def test_a_saved_pipeline_loads_with_plain_diffusers(unet: Any, tmp_path: Path) -> None:
    pipeline = with_trajectory(DDIMPipeline(unet, DDIMScheduler(beta_start=2e-4)), trajectory())
    pipeline.save_pretrained(tmp_path)
    for kind in (DiffusionPipeline, DDIMPipeline):
        loaded = kind.from_pretrained(tmp_path)
        assert visited_by(loaded.scheduler) == tuple(UNEVEN) and type(loaded) is DDIMPipeline
        assert loaded.scheduler.config.beta_start == 2e-4
        assert np.array_equal(sampled(loaded, 5), sampled(pipeline, 5))
    assert visited_by(octavo.load(tmp_path).scheduler) == tuple(UNEVEN)


def test_a_pipeline_is_built_and_loaded_without_a_word_of_what_is_ignored(
    unet: Any, tmp_path: Path, told_by_diffusers: pytest.LogCaptureFixture
) -> None:
    bound = with_trajectory(DDIMPipeline(unet, DDIMScheduler(beta_start=2e-4)), trajectory())
    bound.save_pretrained(tmp_path)
    for pipeline in (DDIMPipeline(unet, bound.scheduler), DiffusionPipeline.from_pretrained(tmp_path)):
        assert visited_by(pipeline.scheduler) == tuple(UNEVEN) and sampled(pipeline, 5).shape[0] == 2
    assert not told_by_diffusers.messages


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_every_scheduler_survives_saving(name: str, unet: Any, tmp_path: Path) -> None:
    scheduler = own_class(name)()
    pipeline = with_trajectory(DDPMPipeline(unet, scheduler), trajectory())
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path).scheduler
    assert type(loaded) is ADAPTERS[name] and visited_by(loaded) == tuple(UNEVEN)
    assert plain_config(loaded) == plain_config(pipeline.scheduler)


def test_another_count_is_refused(unet: Any) -> None:
    pipeline = with_trajectory(DDIMPipeline(unet, DDIMScheduler()), trajectory())
    with pytest.raises(OctavoError, match=r"num_inference_steps: 50, but .* a trajectory of 5 steps; give 5"):
        pipeline(generator=torch.Generator())
    with pytest.raises(OctavoError, match="timesteps: the scheduler visits"):
        pipeline.scheduler.set_timesteps(timesteps=[5, 0])
    pipeline.scheduler.set_timesteps(timesteps=UNEVEN)
    with pytest.raises(OctavoError, match="timestep: 7 is not one of the trajectory's"):
        pipeline.scheduler.step(torch.zeros(1, 1, 2, 2), 7, torch.zeros(1, 1, 2, 2))
    _, kwargs = first_call(pipeline)
    assert int(kwargs["timestep"]) == UNEVEN[0]
    assert (steps_of(pipeline, 50), steps_of(DDIMPipeline(unet, DDIMScheduler()), 50)) == (5, 50)


def test_what_does_not_fit_is_told_in_one_line(unet: Any) -> None:
    pipeline = DDIMPipeline(unet, DDIMScheduler())
    with pytest.raises(OctavoError, match="is for a model of prediction type 'sample'"):
        with_trajectory(pipeline, Trajectory((9, 0), 1000, "sample", "dp"))
    with pytest.raises(OctavoError, match="is for 10 training timesteps, the scheduler has 1000"):
        with_trajectory(pipeline, Trajectory((9, 0), 10, "epsilon", "dp"))
    with pytest.raises(OctavoError, match="was made for another model"):
        with_trajectory(pipeline, trajectory(model="0" * 32))
    with pytest.raises(OctavoError, match=PNDM):
        with_trajectory(DDPMPipeline(unet, diffusers.PNDMScheduler()), trajectory())
    with pytest.raises(
        OctavoError,
        match=r"trajectory: was made with an eta of 0\.5, .* UniPCMultistepScheduler has not; sample",
    ):
        with_trajectory(DDPMPipeline(unet, diffusers.UniPCMultistepScheduler()), trajectory(eta=0.5))
    with pytest.raises(OctavoError, match="ends at timestep 0, where DEIS itself jumps to"):
        with_trajectory(DDPMPipeline(unet, diffusers.DEISMultistepScheduler()), trajectory([9, 0]))
    with pytest.raises(OctavoError, match="needs the timesteps of its trajectory"):
        ADAPTERS["DDPMScheduler"]()
    with pytest.raises(OctavoError, match="do not descend"):
        ADAPTERS["DDPMScheduler"](trajectory=[3, 4])


@pytest.mark.parametrize("name", ["karras", "ays_sd"])
def test_one_of_another_noise_schedule_is_refused(unet: Any, name: str) -> None:
    pipeline = DDIMPipeline(unet, DDIMScheduler())
    found = spaced(pipeline.scheduler, name, 4)
    others = (
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_end": 0.0201},
        {"beta_schedule": "scaled_linear"},
    )
    for settings in others:
        other = DDIMPipeline(unet, DDIMScheduler(**settings))
        with pytest.raises(
            OctavoError, match=r"trajectory: is for another noise schedule .*; search one for this model"
        ):
            with_trajectory(other, found)
        with_trajectory(other, spaced(pipeline.scheduler, "trailing", 4))  # which depends on no noise level
        with_trajectory(other, replace(found, alpha_bars=None))
    for solver in SOLVERS:
        if solver not in ("pndm", "deis"):  # every class has the same schedule, in roundings of its own
            with_trajectory(with_scheduler(pipeline, solver), found)


def test_a_schedule_that_ends_in_no_signal_is_one_in_every_solver(unet: Any) -> None:
    settings = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    pipeline = DDIMPipeline(unet, DDIMScheduler(**settings))
    found = spaced(pipeline.scheduler, "karras", 4)
    for solver in ("ddpm", "dpmsolver++", "euler", "unipc"):
        with_trajectory(with_scheduler(pipeline, solver), found)


def test_a_trajectory_takes_the_place_of_another_and_of_own_noise_levels(unet: Any) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True)
    first = with_trajectory(DDPMPipeline(unet, scheduler), trajectory())
    second = with_trajectory(first, trajectory([900, 10]))
    assert visited_by(first.scheduler) == tuple(UNEVEN) and visited_by(second.scheduler) == (900, 10)
    assert (
        not first.scheduler.config.use_karras_sigmas
        and plain_name(second.scheduler) == type(scheduler).__name__
    )


def test_noise_levels_that_euler_spaces_itself_give_way_to_those_of_the_timesteps(unet: Any) -> None:
    own = diffusers.EulerDiscreteScheduler(interpolation_type="log_linear")
    placed = with_trajectory(DDPMPipeline(unet, own), trajectory()).scheduler
    placed.set_timesteps(5)
    alpha_bars = placed.alphas_cumprod[UNEVEN].double()
    assert placed.sigmas[:-1].tolist() == pytest.approx(
        ((1 - alpha_bars) / alpha_bars).sqrt().tolist(), rel=1e-5
    )
    assert own.config.interpolation_type == "log_linear"


def test_a_network_that_is_told_noise_levels_has_no_timesteps_to_choose(unet: Any) -> None:
    settings = {"timestep_type": "continuous", "prediction_type": "v_prediction"}
    own = DDPMPipeline(unet, diffusers.EulerDiscreteScheduler(**settings))
    told = Trajectory((900, 10), 1000, "v_prediction", "by hand")
    with pytest.raises(OctavoError, match=r"EulerDiscreteScheduler tells the network noise levels"):
        with_trajectory(own, told)
    kept = DDIMScheduler(prediction_type="v_prediction")
    kept.register_to_config(timestep_type="continuous")  # which DDIM makes nothing of
    with_trajectory(DDPMPipeline(unet, kept), told)


def test_another_scheduler_is_free_of_the_trajectory(unet: Any) -> None:
    bound = with_trajectory(DDIMPipeline(unet, DDIMScheduler()), trajectory())
    free = with_scheduler(bound, "ddpm")
    assert type(free.scheduler) is DDPMScheduler and sampled(free, 3).shape[0] == 2


def test_quantized_versions_are_the_same_model(pipeline: Any, quantized: Any, saved: Path) -> None:
    identity = model_identity(pipeline.unet)
    loaded = octavo.load(saved)
    fast = octavo.accelerate(loaded, precision="f32", batch_size=1)
    for version in (quantized.unet, loaded.unet, fast.unet):
        assert same_model(model_identity(version), identity)
    assert sampled(with_trajectory(quantized, trajectory(model=identity)), 5).shape[0] == 2


def test_another_training_is_another_model(make_pipeline: Any) -> None:
    one, again, other = make_pipeline(0).unet, make_pipeline(0).unet, make_pipeline(1).unet
    identity = model_identity(one)
    assert identity == model_identity(again) and len(identity) < 200
    assert same_model(model_identity(again.to(torch.bfloat16)), identity)
    # normalization as it begins in both: told apart by their weights
    assert model_identity(other).split(".")[0] == identity.split(".")[0]
    assert not same_model(model_identity(other), identity)
    with pytest.raises(OctavoError, match="was made for another model"):
        with_trajectory(make_pipeline(1), trajectory(model=identity))
    with_trajectory(make_pipeline(1), trajectory(model=identity.split(".")[0]))  # a file from before
    torch.nn.init.ones_(one.conv_norm_out.bias)
    assert not same_model(model_identity(one), model_identity(again))

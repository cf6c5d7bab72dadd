from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline

import octavo
from octavo.diffusion import call_pipeline, generators, probe
from octavo.diffusion.samplers import with_scheduler
from octavo.diffusion.solvers.unconditional import UNCONDITIONAL
from octavo.diffusion.trajectories import Trajectory, with_trajectory
from octavo.diffusion.trajectories.bound import visited_by
from octavo.errors import OctavoError

# diffusers' DEIS and UniPC, with NumPy 2
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]
NAMES = sorted(UNCONDITIONAL)
GROWING = [name for name in NAMES if name.startswith(("Euler", "Heun"))]


def network(sample: torch.Tensor, timestep: Any) -> torch.Tensor:
    """Any smooth function of both."""
    return torch.tanh(sample) * (0.2 + 0.8 * float(timestep) / 1000)


def by_hand(name: str, start: torch.Tensor, steps: int, **settings: Any) -> torch.Tensor:
    """A run of diffusers' own class as its documentation has it: scaled noise, scaled inputs."""
    scheduler = getattr(diffusers, name)(**settings)
    scheduler.set_timesteps(steps)
    state = start * scheduler.init_noise_sigma
    noise = {"generator": torch.Generator().manual_seed(3)} if "Ancestral" in name else {}
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(state, t), t)
        state = scheduler.step(output, t, state, **noise).prev_sample
    return state


def as_pipelines_do(scheduler: Any, start: torch.Tensor, steps: int) -> torch.Tensor:
    """The loop of DDPMPipeline."""
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(3)
    for t in scheduler.timesteps:
        start = scheduler.step(network(start, t), t, start, generator=generator).prev_sample
    return start


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", NAMES)
def test_an_unconditional_loop_samples_what_diffusers_own_class_does(name: str, prediction_type: str) -> None:
    # "leading" is where diffusers' own multiplies the noise by sqrt(1 + sigma^2), so that both begin alike
    settings = {
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "timestep_spacing": "leading",
        "prediction_type": prediction_type,
    }
    start = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    ours = as_pipelines_do(UNCONDITIONAL[name](**settings), start, 6)
    torch.testing.assert_close(ours, by_hand(name, start, 6, **settings), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", GROWING)
def test_states_keep_unit_variance_where_the_data_have_it(name: str) -> None:
    scheduler = UNCONDITIONAL[name](timestep_spacing="linspace")
    scheduler.set_timesteps(50)
    state = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    assert scheduler.init_noise_sigma == 1.0
    for t in scheduler.timesteps:
        assert torch.equal(scheduler.scale_model_input(state, t), state)
        output = (1 - scheduler.alphas_cumprod[int(t)]).sqrt() * state
        state = scheduler.step(output, t, state, generator=generator).prev_sample
        assert 0.9 < float(state.std()) < 1.1, t


@pytest.mark.parametrize("name", GROWING)
def test_noise_is_added_as_the_network_was_trained_on_it(name: str) -> None:
    ddpm = diffusers.DDPMScheduler()
    scheduler = UNCONDITIONAL[name](beta_start=1e-4, beta_end=0.02)
    scheduler.set_timesteps(1000)
    image, noise = torch.randn(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    own = torch.tensor([900.0, 500.0, 20.0])
    ours = scheduler.add_noise(image, noise, own)
    torch.testing.assert_close(ours, ddpm.add_noise(image, noise, own.long()), rtol=1e-4, atol=1e-4)


def test_the_result_comes_in_both_forms() -> None:
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    results = []
    for return_dict in (True, False):
        scheduler = UNCONDITIONAL["EulerDiscreteScheduler"]()
        scheduler.set_timesteps(5)
        results.append(scheduler.step(0.5 * x, scheduler.timesteps[0], x, return_dict=return_dict))
    assert type(results[1]) is tuple and torch.equal(results[0].prev_sample, results[1][0])


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_pipeline_loads_with_plain_diffusers(name: str, pipeline: Any, tmp_path: Path) -> None:
    own = with_scheduler(pipeline, name)
    own.save_pretrained(tmp_path)
    expected = call_pipeline(own, generators=generators(0, 0, 2), num_inference_steps=5)
    for kind in (DiffusionPipeline, DDPMPipeline):
        loaded = kind.from_pretrained(tmp_path)
        assert type(loaded.scheduler) is UNCONDITIONAL[name] is getattr(octavo, UNCONDITIONAL[name].__name__)
        again = call_pipeline(loaded, generators=generators(0, 0, 2), num_inference_steps=5)
        assert np.abs(again - expected).max() < 1e-4  # kernels round by where weights lie in memory
    assert type(octavo.load(tmp_path).scheduler) is UNCONDITIONAL[name]


@pytest.mark.parametrize("name", NAMES)
def test_image_k_depends_on_its_own_generator(name: str, pipeline: Any) -> None:
    own = with_scheduler(pipeline, name)
    three = call_pipeline(own, generators=generators(5, 0, 3), num_inference_steps=5)
    one = call_pipeline(own, generators=generators(7, 0, 1), num_inference_steps=5)
    assert np.abs(three[2] - one[0]).max() < 1e-4 and np.abs(three[1] - one[0]).max() > 0.01


@pytest.mark.parametrize("name", [name for name in NAMES if name != "PNDMScheduler"])
def test_trajectories_are_visited_saved_and_left(name: str, pipeline: Any, tmp_path: Path) -> None:
    timesteps = (950, 600, 300, 120, 20)
    bound = with_trajectory(with_scheduler(pipeline, name), Trajectory(timesteps, 1000, "epsilon", "by hand"))
    visited = probe(bound, num_inference_steps=5).timesteps
    assert tuple(dict.fromkeys(int(t) for t in visited)) == timesteps
    bound.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert visited_by(loaded.scheduler) == timesteps and isinstance(loaded.scheduler, UNCONDITIONAL[name])
    images = [
        call_pipeline(p, generators=generators(0, 0, 1), num_inference_steps=5) for p in (bound, loaded)
    ]
    assert np.abs(images[0] - images[1]).max() < 1e-4  # kernels round by where weights lie in memory
    free = with_scheduler(loaded, name)
    assert visited_by(free.scheduler) is None and type(free.scheduler) is UNCONDITIONAL[name]


def test_pndm_needs_the_steps_of_its_start(pipeline: Any) -> None:
    own = with_scheduler(pipeline, "pndm")
    with pytest.raises(
        OctavoError, match="num_inference_steps: PNDM begins with 4 steps of Runge-Kutta; 3 are too"
    ):
        call_pipeline(own, generators=generators(0, 0, 1), num_inference_steps=3)
    assert len(probe(own, num_inference_steps=4).timesteps) == 4 + 9
    with pytest.raises(OctavoError, match="PNDMScheduler takes no timesteps of one's choice; ddim"):
        with_trajectory(own, Trajectory((900, 400), 1000, "epsilon", "by hand"))

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from torch import Tensor

from octavo.diffusion import call_pipeline, generators
from octavo.diffusion.analytic import Gamma, with_analytic_variance
from octavo.diffusion.trajectories.bound import remade
from octavo.diffusion.trajectories.own_images import own_images
from octavo.diffusion.trajectories.schedule import noise_schedule
from octavo.diffusion.trajectories.visit import visit
from octavo.errors import OctavoError


def test_any_order_of_timesteps_and_any_states_reach_the_network(ddpm: Callable[[Any], Any]) -> None:
    pipeline = ddpm(DDIMScheduler())
    wanted = [3, 999, 40, 40]
    given = [torch.full((2, 3, 8, 8), float(i)) for i in range(4)]
    seen: list[Tensor] = []

    def on_prediction(index: int, prediction: Tensor, state: Tensor) -> Tensor | None:
        with torch.no_grad():
            expected = pipeline.unet(state, wanted[index]).sample
        torch.testing.assert_close(prediction, expected)
        seen.append(state)
        return given[index + 1] if index < 3 else None

    before = dict(pipeline.scheduler.config)
    visit(pipeline, wanted, on_prediction, generators=generators(5, 0, 2))
    noise = [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)]
    torch.testing.assert_close(seen[0], torch.stack(noise))
    assert all(torch.equal(a, b) for a, b in zip(seen[1:], given[1:], strict=True))
    assert dict(pipeline.scheduler.config) == before and isinstance(pipeline.scheduler, DDIMScheduler)


def test_settings_of_another_scheduler_stay_and_are_not_warned_of(
    ddpm: Callable[[Any], Any], told_by_diffusers: pytest.LogCaptureFixture
) -> None:
    gamma = Gamma((0, 999), (0.5, 1.0), (0.0, 0.0), 1000, "epsilon")
    own = with_analytic_variance(ddpm(DDPMScheduler(clip_sample_range=0.7)), gamma)
    told_by_diffusers.clear()
    visit(own, [9, 5], lambda index, prediction, state: state, generators=generators(0, 0, 1))
    assert not told_by_diffusers.messages
    other = remade(DDPMScheduler, own.scheduler)
    assert type(other) is DDPMScheduler and other.config.clip_sample_range == 0.7
    assert other.config.gamma == [0.5, 1.0] and not told_by_diffusers.messages


def test_a_run_ends_where_it_is_told(ddpm: Callable[[Any], Any]) -> None:
    indices: list[int] = []

    def on_prediction(index: int, prediction: Tensor, state: Tensor) -> None:
        indices.append(index)

    visit(ddpm(DDIMScheduler()), [9, 5, 1], on_prediction, generators=generators(0, 0, 1))
    assert indices == [0]


def test_guidance_is_the_pipelines_own(conditional: Any) -> None:
    """What comes out is the guided prediction of each image, from two calls of the network in each step."""
    embeds = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    seen: list[tuple[Tensor, Tensor]] = []

    def on_prediction(index: int, prediction: Tensor, state: Tensor) -> Tensor:
        seen.append((prediction, state))
        return state / 2

    inputs = {"prompt_embeds": embeds, "in_turn": True}
    visit(conditional, [800, 300], on_prediction, generators=generators(0, 0, 2), inputs=inputs)
    for (prediction, state), t in zip(seen, (800, 300), strict=True):
        with torch.no_grad():
            halves = [conditional._predict(state, torch.tensor(t), c) for c in (embeds, 0 * embeds)]
        torch.testing.assert_close(prediction, 2 * halves[0] - halves[1])
    torch.testing.assert_close(seen[1][1], seen[0][1] / 2)


def test_latents_of_a_guided_transformer(dit: Callable[[Any], Any]) -> None:
    """DiT predicts a learned variance too, and its pipeline doubles the batch for guidance."""
    scheduler = DDIMScheduler(clip_sample=False)
    pipeline = dit(scheduler)
    inputs = {"class_labels": [1, 2]}
    images = own_images(
        pipeline, noise_schedule(scheduler), steps=3, generators=generators(0, 0, 2), inputs=inputs
    )
    assert images.shape == (2, 4, 8, 8) and images.isfinite().all()


def test_states_are_variance_preserving_whatever_the_solver(ddpm: Callable[[Any], Any]) -> None:
    """Euler's own first state is noise times its largest sigma."""
    pipeline = ddpm(EulerDiscreteScheduler())
    states: list[Tensor] = []
    visit(pipeline, [999], lambda i, p, x: states.append(x), generators=generators(0, 0, 4))
    assert states[0].std() == pytest.approx(1.0, rel=0.05)


def test_own_images_are_ddims(ddpm: Callable[[Any], Any]) -> None:
    scheduler = DDIMScheduler(timestep_spacing="linspace", clip_sample_range=2.0)
    pipeline = ddpm(scheduler)
    ours = own_images(pipeline, noise_schedule(scheduler), steps=5, generators=generators(3, 0, 2))
    # diffusers' linspace is evenly spaced with both ends too, but steps by 1000 // 5: it is respaced to compare
    respaced = DDIMScheduler(
        num_train_timesteps=5, trained_betas=[0.1] * 5, clip_sample_range=2.0, timestep_spacing="leading"
    )
    respaced.alphas_cumprod = scheduler.alphas_cumprod[[0, 250, 500, 749, 999]]
    names = [0, 250, 500, 749, 999]
    inner = pipeline.unet.forward
    pipeline.unet.forward = lambda x, t, **kw: inner(x, names[int(t)], **kw)
    pipeline.scheduler = respaced
    theirs = call_pipeline(pipeline, generators=generators(3, 0, 2), num_inference_steps=5, output_type="pt")
    theirs = torch.as_tensor(theirs).permute(0, 3, 1, 2) if theirs.shape[-1] == 3 else torch.as_tensor(theirs)
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), theirs, rtol=1e-4, atol=1e-4)


def test_a_pipeline_that_does_not_step_through_its_scheduler_is_told(ddpm: Callable[[Any], Any]) -> None:
    pipeline = ddpm(DDIMScheduler())

    class Idle(type(pipeline)):  # type: ignore[misc]
        def __call__(
            self, generator: Any = None, num_inference_steps: int = 1, output_type: str = "pt"
        ) -> Any:
            return ([],)

    with pytest.raises(OctavoError, match="Idle does not step through"):
        visit(
            Idle(pipeline.unet, pipeline.scheduler),
            [1],
            lambda i, p, x: None,
            generators=generators(0, 0, 1),
        )

"""Tiny pipelines with seeded random weights, built from configuration alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ConfigMixin,
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    ModelMixin,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def global_rng_is_left_alone() -> Any:
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def told_by_diffusers(caplog: pytest.LogCaptureFixture) -> Any:
    """What diffusers warns of while it makes and configures objects."""
    logger = logging.getLogger("diffusers.configuration_utils")
    caplog.set_level(logging.WARNING, logger=logger.name)
    logger.addHandler(caplog.handler)  # diffusers' loggers do not propagate to where pytest listens
    yield caplog
    logger.removeHandler(caplog.handler)


def seeded(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


@pytest.fixture
def unet() -> UNet2DModel:
    return seeded(
        lambda: UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(32, 32),
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        )
    )


@pytest.fixture
def silent_unet(unet: UNet2DModel) -> UNet2DModel:
    """Predicts exactly 0, so that an image is a function of its noise alone, free of kernels' rounding."""
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    return unet


@pytest.fixture
def ddpm(unet: UNet2DModel) -> Callable[[Any], DDPMPipeline]:
    return lambda scheduler: DDPMPipeline(unet, scheduler)


@pytest.fixture
def dit() -> Callable[[Any], DiTPipeline]:
    transformer = seeded(
        lambda: DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            sample_size=8,
        )
    )
    vae = seeded(lambda: AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8))
    return lambda scheduler: DiTPipeline(transformer, vae, scheduler)


class ConditionalPipeline(DiffusionPipeline):
    """Guidance over a text condition, in one network call or in two, and a nested condition."""

    def __init__(self, unet: UNet2DConditionModel, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        in_turn: bool = False,
        generator: Any = None,
        num_inference_steps: int = 10,
        output_type: str = "pt",
    ) -> tuple[torch.Tensor]:
        assert prompt_embeds is not None
        try:
            x = randn_tensor((len(prompt_embeds), 4, 8, 8), generator=generator)
            self.scheduler.set_timesteps(num_inference_steps)
            for t in self.scheduler.timesteps:
                if in_turn:
                    guided = self._predict(x, t, prompt_embeds), self._predict(x, t, 0 * prompt_embeds)
                else:
                    states = torch.cat([prompt_embeds, 0 * prompt_embeds])
                    guided = self._predict(torch.cat([x, x]), t, states).chunk(2)
                x = self.scheduler.step(2 * guided[0] - guided[1], t, x).prev_sample
        except Exception:
            raise AssertionError("stopping early must not look like an error") from None
        return (x,)

    def _predict(self, x: torch.Tensor, t: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        added = {"time_ids": torch.arange(len(x) * 2.0).reshape(-1, 2), "text_embeds": states.mean(1)}
        return self.unet(x, t, encoder_hidden_states=states, added_cond_kwargs=added, return_dict=False)[0]


@pytest.fixture
def conditional() -> ConditionalPipeline:
    unet = seeded(
        lambda: UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 32),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=4,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=16,
        )
    )
    return ConditionalPipeline(unet, DDIMScheduler())


class NormalDenoiser(ModelMixin, ConfigMixin):
    """E[eps | x_t] for x_0 ~ N(mean, deviation^2 I): sqrt(1 - abar) (x_t - sqrt(abar) mean) / variance of x_t."""

    @register_to_config
    def __init__(
        self,
        alpha_bars: list[float],
        mean: float,
        deviation: float,
        in_channels: int = 3,
        sample_size: int = 8,
    ) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, sample: Tensor, timestep: Any, return_dict: bool = True, **_: Any) -> Any:
        own = self.config
        alpha_bars = torch.tensor(own.alpha_bars, dtype=torch.float64)
        signal = alpha_bars[torch.as_tensor(timestep).reshape(-1).long()].reshape(-1, 1, 1, 1)
        variance = signal * own.deviation**2 + 1 - signal
        noise = (1 - signal).sqrt() * (sample.double() - signal.sqrt() * own.mean) / variance
        noise = (noise * self.scale).to(sample.dtype)
        return UNet2DOutput(sample=noise) if return_dict else (noise,)


@pytest.fixture
def normal_pipeline() -> Callable[..., DDPMPipeline]:
    """A pipeline of the exact denoiser of N(mean, deviation^2 I), by its scheduler's noise schedule."""

    def make(scheduler: Any, mean: float = 0.0, deviation: float = 0.5) -> DDPMPipeline:
        alpha_bars = [float(value) for value in np.asarray(scheduler.alphas_cumprod.double())]
        return DDPMPipeline(NormalDenoiser(alpha_bars, mean, deviation), scheduler)

    return make

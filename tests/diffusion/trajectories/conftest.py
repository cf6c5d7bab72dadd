"""A denoiser whose every answer is known: the exact one for normal data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, DDPMPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


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
        return _Output(noise) if return_dict else (noise,)


class _Output(tuple):
    def __new__(cls, noise: Tensor) -> _Output:
        return super().__new__(cls, (noise,))

    @property
    def sample(self) -> Tensor:
        return self[0]


@pytest.fixture
def normal_pipeline() -> Callable[..., DDPMPipeline]:
    """A pipeline of the exact denoiser of N(mean, deviation^2 I), by its scheduler's noise schedule."""

    def make(scheduler: Any, mean: float = 0.0, deviation: float = 0.5) -> DDPMPipeline:
        alpha_bars = [float(value) for value in np.asarray(scheduler.alphas_cumprod.double())]
        return DDPMPipeline(NormalDenoiser(alpha_bars, mean, deviation), scheduler)

    return make

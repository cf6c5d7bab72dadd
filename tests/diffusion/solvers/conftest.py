"""Data whose every answer is known: normal numbers, and numbers from two normal hills."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, DDPMPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from scipy.integrate import solve_ivp
from torch import Tensor, nn


@dataclass(frozen=True)
class Hills:
    """Each number is from one of normal hills: weights, means, and the deviation of all."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    deviation: float

    def noise(self, x: Tensor, alpha_bar: float) -> Tensor:
        """E[eps | x_t], float64."""
        variance = alpha_bar * self.deviation**2 + 1 - alpha_bar
        off = x.double()[..., None] - alpha_bar**0.5 * torch.tensor(self.means, dtype=torch.float64)
        weights = torch.tensor(self.weights, dtype=torch.float64)
        share = torch.softmax(weights.log() - off**2 / (2 * variance), -1)
        return (1 - alpha_bar) ** 0.5 * (share * off).sum(-1) / variance

    def flow(self, x: Tensor, before: float, after: float) -> Tensor:
        """The probability flow from alpha-bar `before` to `after`: d(x / sqrt(abar)) = eps dsigma, to 11 digits."""
        start, end = (np.log((1 - abar) / abar) / 2 for abar in (before, after))

        def slope(log_sigma: float, y: np.ndarray) -> np.ndarray:
            alpha_bar = 1 / (1 + np.exp(2 * log_sigma))
            noise = self.noise(torch.from_numpy(y) * alpha_bar**0.5, alpha_bar)
            return np.exp(log_sigma) * np.asarray(noise)

        numbers = np.asarray(x.double().flatten() / before**0.5)
        ends = solve_ivp(slope, (start, end), numbers, rtol=1e-11, atol=1e-12, method="DOP853")
        return torch.from_numpy(ends.y[:, -1]).reshape(x.shape) * after**0.5


@pytest.fixture(scope="session")
def hills() -> Hills:
    return Hills((0.4, 0.6), (-0.7, 0.5), 0.3)


@pytest.fixture(scope="session")
def normal() -> Hills:
    return Hills((1.0,), (0.3,), 0.5)


class HillsDenoiser(ModelMixin, ConfigMixin):
    """The exact denoiser of `Hills`, at real timesteps too: log((1 - abar) / abar) is linear between whole ones."""

    @register_to_config
    def __init__(
        self,
        log_ratios: list[float],
        weights: list[float],
        means: list[float],
        deviation: float,
        prediction_type: str = "epsilon",
        in_channels: int = 3,
        sample_size: int = 8,
    ) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.hills = Hills(tuple(weights), tuple(means), deviation)
        self.asked: list[float] = []

    def forward(self, sample: Tensor, timestep: Any, return_dict: bool = True, **_: Any) -> Any:
        self.asked.append(float(timestep))
        log_ratios = self.config.log_ratios
        alpha_bar = 1 / (1 + np.exp(np.interp(float(timestep), np.arange(len(log_ratios)), log_ratios)))
        noise = self.hills.noise(sample, alpha_bar)
        if self.config.prediction_type == "v_prediction":
            image = (sample.double() - (1 - alpha_bar) ** 0.5 * noise) / alpha_bar**0.5
            noise = alpha_bar**0.5 * noise - (1 - alpha_bar) ** 0.5 * image
        return UNet2DOutput(sample=(noise * self.scale).to(sample.dtype))


@pytest.fixture
def hills_pipeline() -> Callable[..., DDPMPipeline]:
    """A pipeline of the exact denoiser of the hills, by its scheduler's noise schedule and prediction type."""

    def make(scheduler: Any, hills: Hills, sample_size: int = 8) -> DDPMPipeline:
        alpha_bars = np.asarray(scheduler.alphas_cumprod.double())
        network = HillsDenoiser(
            np.log((1 - alpha_bars) / alpha_bars).tolist(),
            list(hills.weights),
            list(hills.means),
            hills.deviation,
            scheduler.config.prediction_type,
            sample_size=sample_size,
        )
        return DDPMPipeline(network, scheduler)

    return make

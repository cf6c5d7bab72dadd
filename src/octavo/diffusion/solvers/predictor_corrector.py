"""Predictor-corrector sampling of a variance-preserving model: Langevin dynamics at each noise level (2011.13456)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from octavo.diffusion.solvers.settings import announce_settings
from octavo.errors import OctavoError


class PredictorCorrectorScheduler(DDPMScheduler):
    """Reverse diffusion as the predictor, Langevin dynamics as the corrector, on any timesteps t_K > ... > t_1.

    From t_i to t_{i-1}, with abar of the timesteps visited, beta_i = 1 - abar_i / abar_{i-1} (abar_0 = 1, the image),
    the score s = -eps / sqrt(1 - abar), and z ~ N(0, I) anew each time:

        predictor  x_{i-1} = (2 - sqrt(1 - beta_i)) x_i + beta_i s(x_i, t_i) + sqrt(beta_i) z
        corrector  x_i <- x_i + e s(x_i, t_i) + sqrt(2 e) z,     e = 2 (1 - beta_i) (snr || z || / || s ||)^2

    with the norms of each image alone. The corrector runs `corrector_steps` times after each predictor but the last,
    which adds no noise: K + corrector_steps (K - 1) evaluations of the network, in `timesteps` as they come. Settings
    are those of `DDPMScheduler` and, besides,

    snr              r, the ratio of signal to noise that sets the corrector's step size; 0.16 is the authors' default.
    corrector_steps  M, at least 0.

    The predictor is a first-order formula for small beta: a hundred steps or more. Predicted images are not clipped.
    Raises `OctavoError` for settings out of range. Source: 2011.13456, algorithm 5 and appendix G.

    >>> scheduler = PredictorCorrectorScheduler(corrector_steps=2)
    >>> scheduler.set_timesteps(3)
    >>> scheduler.timesteps.tolist()
    [666, 333, 333, 333, 0, 0, 0]
    """

    clips_images: ClassVar[bool] = False

    def __init__(self, *args: Any, snr: float = 0.16, corrector_steps: int = 1, **settings: Any) -> None:
        super().__init__(*args, **settings)
        if not 0 < snr <= 1:
            raise OctavoError(f"snr: {snr!r} is not above 0 and at most 1")
        if type(corrector_steps) is not int or corrector_steps < 0:
            raise OctavoError(f"corrector_steps: {corrector_steps!r} is not a whole number from 0")
        self.register_to_config(snr=snr, corrector_steps=corrector_steps)

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, timesteps: Any = None
    ) -> None:
        """DDPM's timesteps for this count, or the list given; each but the first 1 + corrector_steps times."""
        from octavo.diffusion.trajectories.schedule import noise_schedule

        super().set_timesteps(num_inference_steps, device, timesteps)
        self._schedule = noise_schedule(self)
        levels: Tensor = self.timesteps  # type: ignore[has-type]
        self._levels = [int(t) for t in levels]
        self._place = 0
        repeats = torch.full_like(levels, 1 + self.config.corrector_steps)
        repeats[:1] = 1
        self.timesteps = levels.repeat_interleave(repeats)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """One line of the above: the corrector's where the timestep is to come again, else the predictor's.

        model_output, sample: [N, C, ...], a generator for each image or one for all. Returns the state that the next
        evaluation is of, and x_0 as predicted here.
        """
        repeats = 1 + self.config.corrector_steps
        index, turn = divmod(self._place + repeats - 1, repeats)  # the first timestep comes only once
        self._place += 1
        level = self._levels[index]
        image, eps = self._schedule.split(model_output, sample, level)
        alpha_bar = self._schedule.alpha_bars[level]
        score = -eps / (1 - alpha_bar) ** 0.5
        if turn < self.config.corrector_steps:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            following = self._corrected(sample, score, noise, self._beta(index))
        else:
            beta = self._beta(index)
            following = (2 - (1 - beta) ** 0.5) * sample + beta * score
            if index + 1 < len(self._levels):
                noise = randn_tensor(
                    sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
                )
                following = following + beta**0.5 * noise
        if not return_dict:
            return following, image
        return DDPMSchedulerOutput(prev_sample=following, pred_original_sample=image)

    def _beta(self, index: int) -> float:
        """1 - abar_t / abar of the next timestep visited, or of the image."""
        alpha_bars, last = self._schedule.alpha_bars, index + 1 == len(self._levels)
        cleaner = 1.0 if last else alpha_bars[self._levels[index + 1]]
        return float(1 - alpha_bars[self._levels[index]] / cleaner)

    def _corrected(self, sample: Tensor, score: Tensor, noise: Tensor, beta: float) -> Tensor:
        ratio = _norms(noise) / _norms(score)
        size = 2 * (1 - beta) * (self.config.snr * ratio) ** 2
        return sample + size * score + (2 * size).sqrt() * noise


def _norms(batch: Tensor) -> Tensor:
    """Of each image: [N, C, ...] => [N, 1, ...]."""
    return batch.flatten(1).norm(dim=1).reshape(-1, *[1] * (batch.ndim - 1))


announce_settings(PredictorCorrectorScheduler, "snr", "corrector_steps")

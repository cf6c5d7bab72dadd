"""Progressive distillation (Salimans and Ho 2202.00512): one DDIM step of a student does two of its teacher's.

Written with z_t = alpha_t x + sigma_t eps, alpha_t^2 = alpha-bar_t, alpha_t^2 + sigma_t^2 = 1, and timestep -1 for the
image itself (alpha = 1, sigma = 0), which is what `set_alpha_to_one` means to diffusers.
"""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, UNet2DModel


def trailing_timesteps(steps: int, num_train_timesteps: int) -> torch.Tensor:
    """The `steps` timesteps of "trailing" spacing and the image's: round(T (K - k) / K) - 1, k = 0 ... K; int64, K + 1.

    Those of K steps are every second one of those of 2 K steps. A plain `DDIMScheduler` visits the same, and jumps
    from each to the next, where K divides T (elsewhere its jumps are T // K, so they may miss the next by one).

    >>> trailing_timesteps(4, 1000).tolist()
    [999, 749, 499, 249, -1]
    """
    left = torch.arange(steps, -1, -1, dtype=torch.float64)
    return (num_train_timesteps * left / steps).round().long() - 1


def alpha_sigma(scheduler: DDIMScheduler, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha_t and sigma_t (float32, N x 1 x 1 x 1) at `timesteps` (int64, N; -1: the image)."""
    alpha_bars = torch.cat([torch.ones(1), scheduler.alphas_cumprod])[timesteps + 1]
    return alpha_bars.sqrt().view(-1, 1, 1, 1), (1 - alpha_bars).sqrt().view(-1, 1, 1, 1)


def ddim_step(
    unet: UNet2DModel,
    scheduler: DDIMScheduler,
    z: torch.Tensor,
    timesteps: torch.Tensor,
    next_timesteps: torch.Tensor,
) -> torch.Tensor:
    """z at `next_timesteps` from z at `timesteps`, alpha_s x + sigma_s eps, each image at a timestep of its own.

    x and eps are what the network says, by `scheduler`'s `prediction_type`; x is clipped where `scheduler` clips it and
    eps then stays as it was, as in diffusers.
    """
    alpha, sigma = alpha_sigma(scheduler, timesteps)
    output = unet(z, timesteps).sample
    if scheduler.config.prediction_type == "v_prediction":
        x, eps = alpha * z - sigma * output, sigma * z + alpha * output
    else:
        x, eps = (z - sigma * output) / alpha, output
    if scheduler.config.clip_sample:
        x = x.clamp(-scheduler.config.clip_sample_range, scheduler.config.clip_sample_range)
    alpha, sigma = alpha_sigma(scheduler, next_timesteps)
    return alpha * x + sigma * eps


def target(
    scheduler: DDIMScheduler,
    z: torch.Tensor,
    timesteps: torch.Tensor,
    reached: torch.Tensor,
    next_timesteps: torch.Tensor,
) -> torch.Tensor:
    """The v that takes one DDIM step from `z` at `timesteps` to `reached` at `next_timesteps` (algorithm 2).

    x = (z_s - (sigma_s / sigma_t) z_t) / (alpha_s - (sigma_s / sigma_t) alpha_t), v = (alpha_t z_t - x) / sigma_t.
    """
    alpha, sigma = alpha_sigma(scheduler, timesteps)
    next_alpha, next_sigma = alpha_sigma(scheduler, next_timesteps)
    ratio = next_sigma / sigma
    x = (reached - ratio * z) / (next_alpha - ratio * alpha)
    return (alpha * z - x) / sigma


def loss(
    scheduler: DDIMScheduler, output: torch.Tensor, wanted: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """Truncated-SNR loss, max(SNR, 1) ||x - x_wanted||^2 (section 4), as one of v: a mean over batch and pixels.

    ||v - v'||^2 = (SNR + 1) ||x - x'||^2, so v's error is weighted by max(SNR, 1) / (SNR + 1) = max(alpha^2, sigma^2).
    """
    alpha, sigma = alpha_sigma(scheduler, timesteps)
    return (torch.maximum(alpha, sigma).square() * (output - wanted).square()).mean()


def student_scheduler(scheduler: DDIMScheduler) -> DDIMScheduler:
    """What a student is sampled with: the teacher's noise schedule, v-prediction, trailing spacing, x not clipped.

    Unclipped, since an x that makes two steps in one may lie outside the images' range.
    """
    return DDIMScheduler.from_config(
        scheduler.config, prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False
    )

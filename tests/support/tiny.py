"""The smallest pipelines of real diffusers classes that every part of Octavo works on."""

from __future__ import annotations

import torch
from diffusers import DDIMPipeline, DDIMScheduler, ScoreSdeVePipeline, ScoreSdeVeScheduler, UNet2DModel

import octavo

RECIPES = (
    octavo.PTQ4DM(samples=4, steps=2, network_output=True, attention_matmuls=True),
    octavo.PTQ4DM(weights=4, group_size=16, samples=4, steps=2, balance=True, output_correction=True),
)
"""Between them they store every kind of tensor that Octavo has."""


def tiny_pipeline(size: int = 8, channels: int = 3, seed: int = 0, levels: int = 2) -> DDIMPipeline:
    """A DDIM pipeline of a U-Net with attention and seeded random weights; of one level, with 20 layers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=1,
            block_out_channels=(16, 32)[:levels],
            down_block_types=("DownBlock2D", "AttnDownBlock2D")[:levels],
            up_block_types=("AttnUpBlock2D", "UpBlock2D")[-levels:],
            attention_head_dim=8,
            norm_num_groups=8,
        )
    pipeline = DDIMPipeline(unet=unet.eval(), scheduler=DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_exploding_pipeline(seed: int = 0, sigma_max: float = 1.0) -> ScoreSdeVePipeline:
    """A variance-exploding pipeline: a network that is told sigma, in Fourier features, and divides by it itself."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(16,),
            down_block_types=("DownBlock2D",),
            up_block_types=("AttnUpBlock2D",),
            attention_head_dim=8,
            norm_num_groups=8,
            time_embedding_type="fourier",
        )
    pipeline = ScoreSdeVePipeline(unet.eval(), ScoreSdeVeScheduler(sigma_max=sigma_max))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

"""Train the second model of the benchmarks: an RGB UNet2DModel, v-prediction, cosine schedule, coloured digits.

    python training/train_colours.py

Everything that decides how quantization behaves is another than in the bundled model: three channels, narrower
blocks, wider heads, another prediction type and schedule, no clipping of x0. It writes
training/colours/ (an ordinary DDIMPipeline folder, EMA weights, fp16 safetensors) and training/colours_loss.csv.
"""

from __future__ import annotations

from pathlib import Path

import digits
import torch
from denoising import arguments, train
from diffusers import DDIMScheduler, UNet2DModel

HERE = Path(__file__).resolve().parent
COPIES = 8
"""Colourings of each digit."""


def build_unet() -> UNet2DModel:
    """2.8 M parameters."""
    return UNet2DModel(
        sample_size=digits.IMAGE_SIZE,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=64,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
    )


def coloured(images: torch.Tensor, seed: int) -> torch.Tensor:
    """Grey digits in [-1, 1] (float32, N x 1 x H x W) as RGB, N x COPIES: ink and paper of two random colours.

    pixel = paper + (ink - paper) (x + 1) / 2, colours uniform in the cube and at least 0.8 apart.
    """
    generator = torch.Generator().manual_seed(seed)
    images = images.repeat(COPIES, 1, 1, 1)
    paper = torch.rand(len(images), 3, 1, 1, generator=generator) * 2 - 1
    ink = torch.rand(len(images), 3, 1, 1, generator=generator) * 2 - 1
    near = (ink - paper).flatten(1).norm(dim=1) < 0.8
    ink[near] = -paper[near].sign()
    return paper + (ink - paper) * (images + 1) / 2


def main() -> None:
    args = arguments(__doc__, HERE / "colours", HERE / "colours_loss.csv", steps=3000).parse_args()
    torch.manual_seed(args.seed)
    images, _ = digits.load("train")
    train(build_unet(), build_scheduler(), coloured(images, args.seed), args, autocast=False)


if __name__ == "__main__":
    main()

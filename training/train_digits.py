"""Train the bundled digits pipeline: an unconditional epsilon-prediction UNet2DModel.

One command, one seed: `make train-digits`. It writes

    OUT/                          an ordinary DDIMPipeline folder (EMA weights, fp16 safetensors)
    training/digits_loss.csv      step, seconds, learning rate, loss (mean over the last 50 steps)

The folder is written every --export-every steps, so a run that is stopped early leaves a
usable, if less trained, model.
"""

from __future__ import annotations

from pathlib import Path

import digits
import torch
from denoising import arguments, train
from diffusers import DDIMScheduler, UNet2DModel

HERE = Path(__file__).resolve().parent
BUNDLED = HERE.parent / "src" / "octavo" / "data" / "digits"


def build_unet() -> UNet2DModel:
    """6.3 M parameters, 1 GFLOP an image: wide enough that int8 pays on a CPU (docs/log.md)."""
    return UNet2DModel(
        sample_size=digits.IMAGE_SIZE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(96, 192),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=32,
    )


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="epsilon",
        clip_sample=True,
    )


def main() -> None:
    args = arguments(__doc__, BUNDLED, HERE / "digits_loss.csv", steps=8000).parse_args()
    torch.manual_seed(args.seed)
    images, _ = digits.load("train")
    # bf16 is 1.5x faster where the CPU has it; weights and sums stay float32
    train(build_unet(), build_scheduler(), images, args, autocast=True)


if __name__ == "__main__":
    main()

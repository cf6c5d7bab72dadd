"""The training loop of the small diffusion pipelines: one seed, EMA weights, a loss curve, a folder on the way."""

from __future__ import annotations

import argparse
import contextlib
import csv
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from tqdm import tqdm


def arguments(description: str | None, out: Path, loss_curve: Path, steps: int) -> argparse.ArgumentParser:
    """What every training script takes; it may add its own."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export-every", type=int, default=500)
    parser.add_argument("--loss-curve", type=Path, default=loss_curve)
    return parser


def stratified_timesteps(batch_size: int, num_timesteps: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform timesteps, one per stratum of a batch: each alone is uniform, the batch has less variance."""
    offsets = torch.rand(batch_size, generator=generator)
    return ((torch.arange(batch_size) + offsets) / batch_size * num_timesteps).long()


def export(unet: UNet2DModel, scheduler: DDIMScheduler, out: Path) -> None:
    copy = UNet2DModel.from_config(unet.config)
    copy.load_state_dict(unet.state_dict())
    DDIMPipeline(unet=copy.half(), scheduler=scheduler).save_pretrained(out)


def train(
    unet: UNet2DModel,
    scheduler: DDIMScheduler,
    images: torch.Tensor,
    args: argparse.Namespace,
    *,
    autocast: bool,
) -> None:
    """Train `unet` on `images` (float32, N x C x H x W, in [-1, 1]) to predict what `scheduler` is configured for.

    `autocast`: forward passes in bf16, which pays on CPUs that have it. Mutates `unet`; writes `args.out` and
    `args.loss_curve` (step, seconds, learning rate, loss: mean over the last 50 steps).
    """
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate, weight_decay=1e-4)
    ema = EMAModel(unet.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)

    def learning_rate(step: int) -> float:
        """Linear warm-up over 200 steps, constant, linear to a tenth over the last fifth."""
        decay = max(0.0, (step - 0.8 * args.steps) / (0.2 * args.steps))
        return args.learning_rate * min(1.0, (step + 1) / 200) * (1 - 0.9 * decay)

    order: list[int] = []
    recent: list[float] = []
    start = time.perf_counter()
    with open(args.loss_curve, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "seconds", "learning_rate", "loss"])
        for step in tqdm(range(args.steps), unit="step", mininterval=10):
            while len(order) < args.batch_size:
                order.extend(torch.randperm(len(images), generator=generator).tolist())
            rows, order = order[: args.batch_size], order[args.batch_size :]
            x0 = images[rows]
            noise = torch.randn(x0.shape, generator=generator)
            timesteps = stratified_timesteps(len(x0), scheduler.config.num_train_timesteps, generator)
            with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                prediction = unet(scheduler.add_noise(x0, noise, timesteps), timesteps).sample
            loss = F.mse_loss(prediction.float(), _target(scheduler, x0, noise, timesteps))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            ema.step(unet.parameters())
            recent.append(loss.item())
            if (step + 1) % 50 == 0:
                seconds = round(time.perf_counter() - start, 1)
                writer.writerow(
                    [step + 1, seconds, f"{learning_rate(step):.3g}", f"{sum(recent) / len(recent):.5f}"]
                )
                file.flush()
                recent.clear()
            if (step + 1) % args.export_every == 0 or step + 1 == args.steps:
                ema.store(unet.parameters())
                ema.copy_to(unet.parameters())
                export(unet, scheduler, args.out)
                ema.restore(unet.parameters())
    print(f"{args.out}: {args.steps} steps in {time.perf_counter() - start:.0f} s")


def _target(
    scheduler: DDIMScheduler, x0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(x0, noise, timesteps)
    return noise

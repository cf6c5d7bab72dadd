"""Distil the bundled model progressively into students of few DDIM steps: 16 -> 8 -> 4.

    python training/distill_digits.py

Each halving trains a student, which starts as a copy of its teacher, to do two of the teacher's DDIM steps in one, and
is the next teacher. Students predict v, so that few steps are stable. One seed; it writes

    training/students/K/          an ordinary DDIMPipeline folder for each K (EMA weights, fp16 safetensors)
    training/students_loss.csv    sampler steps, step, seconds, learning rate, loss (mean since the last row)

    octavo sample training/students/4 --steps 4 --out grid.png

Killed and called again with the same arguments, it goes on from the last --export-every steps. K must divide 1000 for
diffusers' own scheduler to visit exactly the timesteps that were distilled; students between may not.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path
from typing import Any

import digits
import torch
from denoising import arguments, export, stratified_timesteps
from diffusers import DDIMPipeline, UNet2DModel
from diffusers.training_utils import EMAModel
from distillation import ddim_step, loss, student_scheduler, target, trailing_timesteps
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from octavo.files import atomic_path, read_json, write_json

HERE = Path(__file__).resolve().parent
TEACHER = HERE.parent / "src" / "octavo" / "data" / "digits"
COLUMNS = ["sampler_steps", "step", "seconds", "learning_rate", "loss"]


class Run:
    """Everything that a halving changes while it trains, and how it is kept: one safetensors file, written whole."""

    def __init__(self, unet: UNet2DModel, path: Path) -> None:
        self.unet, self.path, self.step = unet, path, 0
        self.optimizer = torch.optim.Adam(unet.parameters(), lr=0.0)
        self.ema = EMAModel(unet.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
        for parameter in unet.parameters():
            self.optimizer.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        if path.exists():
            self._load()

    def update(self, value: torch.Tensor, learning_rate: float) -> None:
        """One step of Adam down the gradient of `value`, and of the running mean of the weights."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.ema.step(self.unet.parameters())
        self.step += 1

    def save(self) -> None:
        with atomic_path(self.path) as temporary:
            save_file(self._tensors(), temporary, metadata={"step": str(self.step)})

    def _load(self) -> None:
        with safe_open(self.path, "pt") as file, torch.no_grad():
            self.step = self.ema.optimization_step = int(file.metadata()["step"])
            for name, tensor in self._tensors().items():
                tensor.copy_(file.get_tensor(name))

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {}
        for (name, parameter), mean in zip(self.unet.named_parameters(), self.ema.shadow_params, strict=True):
            tensors |= {f"weights.{name}": parameter.detach(), f"ema.{name}": mean}
            state = self.optimizer.state[parameter]
            tensors |= {f"{key}.{name}": state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
        return tensors


def halve(
    teacher: DDIMPipeline, steps: int, images: torch.Tensor, args: argparse.Namespace, curve: list[list[Any]]
) -> None:
    """Train the student of `steps` DDIM steps from `teacher`'s 2 x `steps`; write it to `args.out`/`steps`.

    Every step's random numbers come from the seed and the step alone. Appends to `curve`, which is `args.loss_curve`.
    """
    scheduler = student_scheduler(teacher.scheduler)
    fine = trailing_timesteps(2 * steps, scheduler.config.num_train_timesteps)
    student = UNet2DModel.from_config(teacher.unet.config)
    student.load_state_dict(teacher.unet.state_dict())
    teacher.unet.requires_grad_(False).to(memory_format=torch.channels_last)
    run = Run(student, args.out / f"{steps}.progress.safetensors")
    curve[:] = [row for row in curve if int(row[0]) != steps or int(row[1]) <= run.step]
    start = time.perf_counter() - (float(curve[-1][2]) if curve else 0.0)
    recent: list[float] = []
    bar = tqdm(total=args.steps, initial=run.step, desc=f"{2 * steps} -> {steps}", unit="step", mininterval=5)
    while run.step < args.steps:
        generator = torch.Generator().manual_seed(args.seed * 10**9 + steps * 10**6 + run.step)
        x = images[torch.randint(len(images), (args.batch_size,), generator=generator)]
        noise = torch.randn(x.shape, generator=generator)
        k = 2 * stratified_timesteps(args.batch_size, steps, generator)
        z = scheduler.add_noise(x, noise, fine[k])
        with torch.no_grad():
            reached = ddim_step(teacher.unet, teacher.scheduler, z, fine[k], fine[k + 1])
            reached = ddim_step(teacher.unet, teacher.scheduler, reached, fine[k + 1], fine[k + 2])
            wanted = target(scheduler, z, fine[k], reached, fine[k + 2])
        value = loss(scheduler, student(z, fine[k]).sample, wanted, fine[k])
        learning_rate = args.learning_rate * min(1.0, (run.step + 1) / 20) * (1 - run.step / args.steps)
        run.update(value, learning_rate)
        recent.append(value.item())
        bar.update()
        bar.set_postfix(loss=f"{recent[-1]:.4f}", refresh=False)
        if run.step % args.export_every == 0 or run.step == args.steps:
            seconds = round(time.perf_counter() - start, 1)
            curve.append(
                [steps, run.step, seconds, f"{learning_rate:.3g}", f"{sum(recent) / len(recent):.5f}"]
            )
            write_curve(args.loss_curve, curve)
            run.save()
            recent.clear()
    bar.close()
    run.ema.copy_to(student.parameters())
    with atomic_path(args.out / str(steps)) as folder:
        export(student, scheduler, folder)
    run.path.unlink()


def write_curve(path: Path, curve: list[list[Any]]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *curve])


def read_curve(path: Path) -> list[list[Any]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.reader(file))[1:]


def distil(teacher: Path, images: torch.Tensor, args: argparse.Namespace) -> None:
    """From the folder `teacher`, sampled in `args.start` steps, to a student of `args.end` steps in `args.out`.

    A halving starts from what its teacher's folder holds, in fp16, whether or not the run was killed between.
    """
    settings = {
        name: getattr(args, name) for name in ("start", "steps", "batch_size", "learning_rate", "seed")
    }
    begun = args.out / "distillation.json"
    if begun.exists() and read_json(begun) != settings:
        raise SystemExit(
            f"{args.out}: was begun with other arguments, {read_json(begun)}; choose another --out"
        )
    curve = read_curve(args.loss_curve) if begun.exists() else []
    write_json(begun, settings)
    steps = args.start
    while steps > args.end:
        if steps % 2:
            raise SystemExit(f"--start {args.start}: halved, it does not come to --end {args.end}")
        steps //= 2
        if not (args.out / str(steps)).exists():
            halve(DDIMPipeline.from_pretrained(teacher), steps, images, args, curve)
        teacher = args.out / str(steps)


def main() -> None:
    parser = arguments(__doc__, HERE / "students", HERE / "students_loss.csv", steps=650)
    parser.set_defaults(export_every=25, learning_rate=3e-4)
    parser.add_argument("--start", type=int, default=16, help="DDIM steps of the first teacher")
    parser.add_argument("--end", type=int, default=4, help="DDIM steps of the last student")
    images, _ = digits.load("train")
    distil(TEACHER, images, parser.parse_args())


if __name__ == "__main__":
    main()

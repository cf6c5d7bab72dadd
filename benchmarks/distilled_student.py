"""Is a few-step student as good in int8 as in full precision?

    python benchmarks/distilled_student.py --threads 1

The 4-step student of `training/distill_digits.py` in full precision and quantized by a recipe on its own 4 steps, in
real int8 (f32 remainder); beside it the bundled model that it was distilled from, in as many DDIM steps, and in 16, its
first teacher's. FD of the digits' features to the training digits with its jackknife interval, KID, the paired
difference of int8 from full precision, and PSNR of int8 to full precision.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import peers
import torch

import octavo
from octavo.diffusion.trajectories import spaced, with_trajectory
from octavo.evaluation.features import Features, extract
from octavo.evaluation.frechet import frechet_difference, frechet_estimate
from octavo.evaluation.generate import Images, generate, to_uint8
from octavo.evaluation.intervals import mean_estimate
from octavo.evaluation.similarity import psnr
from octavo.evaluation.target import Target

BATCH = 32
STUDENT = Path(__file__).resolve().parent.parent / "training" / "students" / "4"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", type=Path, default=STUDENT)
    parser.add_argument("--steps", type=int, default=4, help="of the student")
    parser.add_argument("--recipes", nargs="+", default=["best"])
    parser.add_argument("--teacher-steps", type=int, nargs="*", default=[4, 16])
    parser.add_argument("--num-images", type=int, default=2048)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the calibration")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", default="distilled_student", help="of the file in results/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    target = Target.of("digits", None, (16, 16, 1))
    real = target.statistics
    assert real is not None
    rows: list[dict[str, object]] = []

    def sampled(pipeline: object, steps: int) -> tuple[Images, Features]:
        fast = octavo.accelerate(pipeline, precision="f32", threads=options.threads, batch_size=BATCH)
        images = generate(fast, options.num_images, steps=steps, batch_size=BATCH)
        return images, extract(target.extractor, to_uint8(images))

    def tell(name: str, features: Features, **figures: object) -> None:
        rows.append({"model": name, "fd_real": frechet_estimate(features.pooled, real).as_json(), **figures})
        print(rows[-1], flush=True)
        peers.save(options.name, {**vars(options), "student": options.student.name, "rows": rows})

    student = octavo.load(str(options.student))
    student.set_progress_bar_config(disable=True)
    exact, of_exact = sampled(student, options.steps)
    tell(f"student, {options.steps} steps", of_exact)
    for recipe in options.recipes:
        for seed in options.seeds:
            chosen = octavo.named_recipe(recipe, steps=options.steps)
            int8, of_int8 = sampled(
                octavo.quantize(student, chosen, seed=seed, batch_size=BATCH), options.steps
            )
            difference = frechet_difference(of_int8.pooled, of_exact.pooled, real, paired=True)
            tell(
                f"student, {options.steps} steps, {recipe}, calibration seed {seed}",
                of_int8,
                fd_real_difference=difference.as_json(),
                fd=frechet_estimate(of_int8.pooled, of_exact.pooled, paired=True).as_json(),
                psnr=mean_estimate(psnr(int8, exact)).as_json(),
            )
    teacher = octavo.load("digits")
    teacher.set_progress_bar_config(disable=True)
    for steps in options.teacher_steps:
        trailing = with_trajectory(teacher, spaced(teacher.scheduler, "trailing", steps))
        tell(f"teacher, {steps} steps", sampled(trailing, steps)[1])


if __name__ == "__main__":
    main()

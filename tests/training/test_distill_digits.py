"""`training/distill_digits.py` on a tiny teacher: what it learns, what it writes, how it goes on after a kill."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from distill_digits import Run, distil, read_curve
from distillation import ddim_step, loss, student_scheduler, target, trailing_timesteps
from tiny import tiny_pipeline

import octavo

IMAGES = torch.linspace(-1, 1, 4 * 64).sin().reshape(4, 1, 8, 8)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distil") / "teacher"
    unet = tiny_pipeline(channels=1, levels=1).unet
    DDIMPipeline(unet, DDIMScheduler(prediction_type="v_prediction")).save_pretrained(folder)
    return folder


def arguments(out: Path, **changes: Any) -> argparse.Namespace:
    settings = {"steps": 60, "batch_size": 8, "learning_rate": 5e-3, "seed": 0, "export_every": 10}
    settings |= {"start": 4, "end": 2, "out": out / "students", "loss_curve": out / "loss.csv"}
    return argparse.Namespace(**{**settings, **changes})


@pytest.fixture(scope="module")
def distilled(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From 4 steps to 2, without a break."""
    out = tmp_path_factory.mktemp("whole")
    distil(teacher, IMAGES, arguments(out))
    return out


def images(unet: UNet2DModel, scheduler: Any, steps: int) -> np.ndarray:
    pipeline = DDIMPipeline(unet=unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(100 + k) for k in range(8)]
    made = pipeline(batch_size=8, generator=seeds, num_inference_steps=steps, output_type="np")
    return np.asarray(made.images)


def test_the_loss_falls(distilled: Path) -> None:
    curve = read_curve(distilled / "loss.csv")
    assert [int(row[1]) for row in curve] == [10, 20, 30, 40, 50, 60] and {row[0] for row in curve} == {"2"}
    losses = [float(row[4]) for row in curve]
    assert losses[-1] < 0.75 * losses[0] and all(np.isfinite(losses))


def test_two_steps_of_the_student_come_near_to_four_of_the_teacher(distilled: Path, teacher: Path) -> None:
    original: Any = DDIMPipeline.from_pretrained(teacher)
    student: Any = DDIMPipeline.from_pretrained(distilled / "students" / "2")
    assert student.scheduler.config.prediction_type == "v_prediction"
    student.scheduler.set_timesteps(2)
    assert student.scheduler.timesteps.tolist() == trailing_timesteps(2, 1000)[:-1].tolist()
    trailing = DDIMScheduler.from_config(original.scheduler.config, timestep_spacing="trailing")
    wanted = images(original.unet, trailing, 4)
    begun = np.abs(images(original.unet, student.scheduler, 2) - wanted).mean()
    reached = np.abs(images(student.unet, student.scheduler, 2) - wanted).mean()
    assert reached < 0.6 * begun


def test_the_student_is_an_ordinary_folder_that_is_quantized(distilled: Path) -> None:
    student = octavo.load(distilled / "students" / "2")
    quantized = octavo.quantize(student, octavo.PTQ4DM(samples=2, steps=2), batch_size=2, progress=False)
    assert quantized(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)
    assert not list((distilled / "students").glob("*.progress.safetensors"))


def test_a_killed_run_goes_on_to_the_same_bits(
    distilled: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Run.update

    def killed(self: Run, *args: Any) -> None:
        if self.step == 35:
            raise KeyboardInterrupt
        update(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "update", killed)
        with pytest.raises(KeyboardInterrupt):
            distil(teacher, IMAGES, arguments(tmp_path))
    assert (tmp_path / "students" / "2.progress.safetensors").is_file()
    assert not (tmp_path / "students" / "2").exists()
    made: list[int] = []
    monkeypatch.setattr(Run, "update", lambda self, *args: (made.append(self.step), update(self, *args)))
    distil(teacher, IMAGES, arguments(tmp_path))
    assert made == [*range(30, 60)], "it goes on from what was kept"
    one, other = (
        DDIMPipeline.from_pretrained(out / "students" / "2").unet.state_dict()
        for out in (distilled, tmp_path)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    rows = [[row[:2] + row[3:] for row in read_curve(out / "loss.csv")] for out in (distilled, tmp_path)]
    assert rows[0] == rows[1]
    made.clear()
    distil(teacher, IMAGES, arguments(tmp_path))
    assert not made, "what is there is not made again"


def test_other_arguments_in_the_same_folder_are_refused(
    distilled: Path, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="was begun with other arguments"):
        distil(teacher, IMAGES, arguments(distilled, seed=1))
    with pytest.raises(SystemExit, match="--start 6: halved, it does not come to --end 2"):
        distil(teacher, IMAGES, arguments(tmp_path, start=6, steps=1))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_target_is_the_step_that_lands_where_two_did(prediction_type: str) -> None:
    """A student that outputs the target goes in one DDIM step to where the teacher's two steps went."""
    unet = tiny_pipeline(channels=1, levels=1).unet
    scheduler: Any = DDIMScheduler(prediction_type=prediction_type)
    own = student_scheduler(scheduler)
    z = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    fine = trailing_timesteps(4, 1000)
    t, between, s = (
        fine[torch.tensor([0, 2, 2])],
        fine[torch.tensor([1, 3, 3])],
        fine[torch.tensor([2, 4, 4])],
    )
    with torch.no_grad():
        reached = ddim_step(unet, scheduler, ddim_step(unet, scheduler, z, t, between), between, s)
        wanted = target(own, z, t, reached, s)

        class Student(torch.nn.Module):
            def forward(self, sample: Any, timestep: Any) -> Any:
                return argparse.Namespace(sample=wanted)

        student: Any = Student()
        torch.testing.assert_close(ddim_step(student, own, z, t, s), reached, rtol=1e-4, atol=1e-4)
    assert float(loss(own, wanted, wanted, t)) == 0 < float(loss(own, wanted + 0.1, wanted, t))

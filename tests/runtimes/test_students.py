"""Students of few steps through the whole path: quantized, saved, loaded, executed in int8, near to their own float.

Tiny random networks under the schedulers that such students are sampled with: latent consistency (timesteps that are
not evenly spaced, noise in every step, a network that is told the guidance scale), TCD, consistency models (float
timesteps, scaled inputs), and progressive distillation (DDIM, v-prediction, trailing).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    LCMScheduler,
    TCDScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.utils.torch_utils import randn_tensor

import octavo
from octavo.diffusion import first_call
from octavo.evaluation.generate import generate

STEPS = 4
IMAGES = 6


class GuidedLatentConsistency(DiffusionPipeline):
    """What diffusers' LatentConsistencyModelPipeline asks of its network, without its text encoder and decoder."""

    def __init__(self, unet: UNet2DConditionModel, scheduler: LCMScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt_embeds: torch.Tensor,
        guidance_scale: float = 8.5,
        num_inference_steps: int = 4,
        original_inference_steps: int | None = None,
        generator: Any = None,
        output_type: str = "np",
    ) -> tuple[Any]:
        x = randn_tensor((len(prompt_embeds), 3, 8, 8), generator=generator)
        self.scheduler.set_timesteps(num_inference_steps, original_inference_steps=original_inference_steps)
        angles = (guidance_scale - 1) * 1000 * torch.logspace(0, -4, 8)
        w = torch.cat([angles.sin(), angles.cos()]).repeat(len(x), 1)
        for t in self.scheduler.timesteps:
            output = self.unet(x, t, timestep_cond=w, encoder_hidden_states=prompt_embeds, return_dict=False)[
                0
            ]
            x, denoised = self.scheduler.step(output, t, x, generator=generator, return_dict=False)
        image = (denoised / 2 + 0.5).clamp(0, 1)
        return (image.permute(0, 2, 3, 1).numpy() if output_type == "np" else image,)


def unconditional(**settings: Any) -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        attention_head_dim=8,
        norm_num_groups=8,
        **settings,
    )


def latent_consistency() -> DiffusionPipeline:
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32,),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=16,
        attention_head_dim=4,
        time_cond_proj_dim=16,
    )
    return GuidedLatentConsistency(unet, LCMScheduler(prediction_type="v_prediction", clip_sample=True))


def tcd() -> DiffusionPipeline:
    return DDPMPipeline(unconditional(), TCDScheduler(prediction_type="v_prediction", clip_sample=True))


def consistency() -> DiffusionPipeline:
    unet = unconditional(num_class_embeds=10, resnet_time_scale_shift="scale_shift")
    return ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler())


def progressive() -> DiffusionPipeline:
    scheduler = DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False)
    return DDIMPipeline(unconditional(), scheduler)


EMBEDS = torch.randn(IMAGES, 5, 16, generator=torch.Generator().manual_seed(1))
KINDS: dict[str, tuple[Callable[[], DiffusionPipeline], dict[str, Any]]] = {
    "latent consistency": (latent_consistency, {"prompt_embeds": EMBEDS, "guidance_scale": 7.5}),
    "tcd": (tcd, {}),
    "consistency": (consistency, {"class_labels": [1, 5, 7]}),
    "progressive": (progressive, {}),
}


class Student:
    """A kind of student in full precision and quantized on its own few steps, and how it is sampled."""

    def __init__(self, kind: str) -> None:
        build, self.inputs = KINDS[kind]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.pipeline = build()
        next(iter(self.pipeline.components.values())).eval()
        recipe = octavo.PTQ4DM(samples=24, steps=STEPS, pairs_per_trajectory=2, metric="minmax")
        self.int8 = octavo.quantize(self.pipeline, recipe, batch_size=4, inputs=self.inputs, progress=False)

    def images(self, pipeline: DiffusionPipeline, batch_size: int = IMAGES) -> np.ndarray:
        return generate(
            pipeline, IMAGES, steps=STEPS, batch_size=batch_size, inputs=self.inputs, progress=False
        )


@pytest.fixture(scope="module", params=KINDS)
def student(request: pytest.FixtureRequest) -> Student:
    return Student(request.param)


def test_images_are_near_those_of_full_precision(student: Student) -> None:
    exact, quantized = student.images(student.pipeline), student.images(student.int8)
    assert np.isfinite(quantized).all()
    assert 0 < np.abs(quantized - exact).mean() < 0.1 * exact.std()


def test_it_saves_and_loads(student: Student, tmp_path: Path) -> None:
    student.int8.save_pretrained(tmp_path / "int8")
    loaded = type(student.int8).from_pretrained(tmp_path / "int8")
    assert type(loaded.scheduler) is type(student.pipeline.scheduler)
    assert np.array_equal(student.images(loaded), student.images(student.int8))


def test_it_runs_in_int8(student: Student) -> None:
    fast = octavo.accelerate(student.int8, precision="f32", batch_size=IMAGES, inputs=student.inputs)
    rows = octavo.audit(fast)
    assert rows and all(row.ok for row in rows)
    args, kwargs = first_call(student.pipeline, batch_size=IMAGES, inputs=student.inputs)
    with torch.no_grad():
        exact, simulated, executed = (
            pipeline.unet(*args, **kwargs)[0] for pipeline in (student.pipeline, student.int8, fast)
        )
    error = (simulated - exact).norm()
    assert (executed - simulated).norm() < 0.5 * error < 0.1 * exact.norm()
    images = student.images(fast)
    assert np.isfinite(images).all() and np.abs(images - student.images(student.int8)).mean() < 0.05


def test_image_k_depends_on_its_seed_alone(student: Student) -> None:
    together, apart = student.images(student.int8), student.images(student.int8, batch_size=2)
    assert np.allclose(together, apart, atol=0.02) and np.abs(together - apart).mean() < 1e-3

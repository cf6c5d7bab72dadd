from __future__ import annotations

import inspect
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
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UNet2DModel,
)

from octavo.diffusion import call_pipeline, generators
from octavo.diffusion.run import replaced_step
from octavo.errors import OctavoError

# diffusers' DPM-Solver hands a torch tensor to np.array, of which torch 2.13 and NumPy 2 together warn.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


def run(pipeline: Any, start: int, count: int, steps: int = 4, **kwargs: Any) -> Any:
    return call_pipeline(
        pipeline,
        generators=generators(11, start, count),
        num_inference_steps=steps,
        first_image=start,
        **{"output_type": "pt", **kwargs},
    )


@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
def test_returns_what_the_pipeline_returns(unet: Any, output_type: str) -> None:
    pipeline = DDIMPipeline(unet, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    ours = run(pipeline, 0, 3, output_type=output_type, inputs={"eta": 0.5})
    theirs = pipeline(
        batch_size=3,
        generator=generators(11, 0, 3),
        num_inference_steps=4,
        eta=0.5,
        output_type=output_type,
    ).images
    assert type(ours) is type(theirs) and len(ours) == 3
    for image, other in zip(ours, theirs, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(other))


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(),
        DDIMScheduler(),
        DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
        DPMSolverMultistepScheduler(),
    ],
)
def test_noise_of_an_image_does_not_depend_on_its_batch(silent_unet: Any, scheduler: Any) -> None:
    pipeline = DDPMPipeline(silent_unet, scheduler)
    together = run(pipeline, 0, 5)
    apart = torch.cat([run(pipeline, 0, 2), run(pipeline, 2, 1), run(pipeline, 3, 2)])
    assert torch.equal(together, apart)
    assert len({image.sum().item() for image in together}) == 5


def test_dit_noise_is_seeded_although_the_pipeline_passes_no_generator(dit: Any) -> None:
    pipeline = dit(DDPMScheduler())
    for parameter in pipeline.transformer.proj_out_2.parameters():
        torch.nn.init.zeros_(parameter)
    pipeline.vae.decode = lambda latents: type("Decoded", (), {"sample": latents})
    inputs = {"class_labels": [1, 2, 3, 4]}
    together = run(pipeline, 0, 4, inputs=inputs)
    apart = torch.cat([run(pipeline, 0, 1, inputs=inputs), run(pipeline, 1, 3, inputs=inputs)])
    assert torch.equal(together, apart)
    unguided = run(pipeline, 0, 4, inputs={**inputs, "guidance_scale": 1.0})
    assert not torch.equal(unguided, torch.zeros_like(unguided))


def test_only_the_noise_of_stochastic_steps_is_ours(dit: Any) -> None:
    """With a deterministic scheduler our run is the pipeline's own, bit for bit."""
    pipeline = dit(DDIMScheduler())
    ours = run(pipeline, 0, 2, inputs={"class_labels": [7, 8]}, output_type="np")
    theirs = pipeline([7, 8], generator=generators(11, 0, 2), num_inference_steps=4, output_type="np")
    assert np.array_equal(ours, theirs.images)


def test_image_k_gets_its_own_label(dit: Any) -> None:
    pipeline = dit(DDIMScheduler())
    seen: list[torch.Tensor] = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["class_labels"]), with_kwargs=True
    )
    run(pipeline, 4, 3, steps=1, inputs={"class_labels": [10, 11, 12, 13, 14]})
    assert seen[0].tolist() == [14, 10, 11, 1000, 1000, 1000]


def test_missing_unknown_and_reserved_inputs(ddpm: Any, dit: Any, conditional: Any) -> None:
    for pipeline, inputs, message in (
        (dit(DDIMScheduler()), None, r"DiTPipeline needs class_labels \(--class-labels\)"),
        (dit(DDIMScheduler()), {"class_labels": []}, "class_labels is empty"),
        (conditional, None, r"ConditionalPipeline needs prompt \(--prompt\)"),
        (ddpm(DDPMScheduler()), {"eta": 1.0}, "eta .*: is DDIM's, and DDPMScheduler has none"),
        (ddpm(DDPMScheduler()), {"etta": 1.0}, "DDPMPipeline takes no etta"),
        (ddpm(DDPMScheduler()), {"batch_size": 2}, "batch_size is set by Octavo"),
        (
            dit(DDIMScheduler()),
            {"class_labels": 1, "guidance_scale": "x"},
            "'x' is text; DiTPipeline has 4.0 by default",
        ),
        (conditional, {"prompt": "a", "num_images_per_prompt": 2}, "num_images_per_prompt: Octavo makes one"),
    ):
        with pytest.raises(OctavoError, match=message):
            run(pipeline, 0, 1, inputs=inputs)


@pytest.mark.parametrize("eta", [5, -0.1, float("nan"), True, "0.5", None, [0.5]])
def test_an_eta_out_of_range_is_told_before_anything_runs(unet: Any, eta: Any) -> None:
    unet.forward = None
    for kind in (DDIMPipeline, DDPMPipeline):
        with pytest.raises(OctavoError, match=r"inputs: eta \(--eta\): .* is not a number from 0 to 1"):
            run(kind(unet, DDIMScheduler()), 0, 1, inputs={"eta": eta})


def test_eta_reaches_ddim_in_pipelines_that_hand_none_on(unet: Any, dit: Any) -> None:
    scheduler = DDIMScheduler()
    plain = DDPMPipeline(unet, scheduler)
    for eta in (0.0, 0.5, 1):
        theirs = run(DDIMPipeline(unet, scheduler), 0, 2, inputs={"eta": eta})
        assert torch.equal(run(plain, 0, 2, inputs={"eta": eta}), theirs)
    assert not torch.equal(run(plain, 0, 2), theirs) and "step" not in vars(scheduler)
    transformer = dit(DDIMScheduler())
    quiet, noisy = (run(transformer, 0, 1, inputs={"class_labels": 1, "eta": eta}) for eta in (0.0, 1.0))
    assert not torch.equal(quiet, noisy)


@pytest.fixture
def ten_classes(unet: UNet2DModel) -> ConsistencyModelPipeline:
    """A U-Net of ten classes, which its pipeline takes as an option."""
    width = unet.time_embedding.linear_2.out_features
    unet.class_embedding = torch.nn.Embedding.from_pretrained(torch.zeros(10, width))
    unet.register_to_config(num_class_embeds=10)
    return ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler())


@pytest.mark.parametrize("labels", [12, [1, 2, 3, 10], -1, torch.tensor([9, 10]), ["cat"]])
def test_a_label_of_no_class_is_told_before_anything_runs(ten_classes: Any, labels: Any) -> None:
    ten_classes.unet.forward = None
    with pytest.raises(
        OctavoError, match=r"class_labels.* is out of range; this model has 10 classes, 0 to 9$"
    ):
        run(ten_classes, 0, 1, inputs={"class_labels": labels})


def test_labels_at_the_ends_of_the_range(ten_classes: Any, dit: Any) -> None:
    run(ten_classes, 0, 2, inputs={"class_labels": [0, 9]})
    run(dit(DDIMScheduler()), 0, 2, steps=1, inputs={"class_labels": [0, 999]})
    with pytest.raises(OctavoError, match="1000 is out of range; this model has 1,000 classes, 0 to 999"):
        run(dit(DDIMScheduler()), 0, 1, inputs={"class_labels": 1000})  # the row of "no class"


def test_labels_are_not_drawn_where_no_seed_decides_them(ten_classes: Any) -> None:
    with pytest.raises(OctavoError, match="ConsistencyModelPipeline needs class_labels"):
        run(ten_classes, 0, 1)


def test_no_images(ddpm: Any) -> None:
    with pytest.raises(OctavoError, match="generators: there is none"):
        run(ddpm(DDPMScheduler()), 0, 0)


def test_progress_bar_is_off_during_the_run_and_as_before_after(ddpm: Any, capfd: Any) -> None:
    pipeline = ddpm(DDPMScheduler())
    pipeline.set_progress_bar_config(desc="mine")
    run(pipeline, 0, 1)
    assert capfd.readouterr().err == ""
    assert pipeline._progress_bar_config == {"desc": "mine"}
    with pytest.raises(RuntimeError, match="broken"):
        pipeline.unet.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
        run(pipeline, 0, 1)
    assert pipeline._progress_bar_config == {"desc": "mine"}
    assert "step" not in vars(pipeline.scheduler)


def test_a_scheduler_without_a_generator_is_left_alone(ddpm: Any) -> None:
    class Deterministic(DDPMScheduler):
        def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
            assert "step" not in vars(self)
            return super().step(model_output, timestep, sample, **kwargs)

    run(ddpm(Deterministic()), 0, 2)


def test_replaced_step_keeps_the_signature_and_the_users_own_patch() -> None:
    scheduler = DDIMScheduler()
    signature = inspect.signature(scheduler.step)

    def mine(*args: Any) -> str:
        return "mine"

    scheduler_with_patch = DDIMScheduler()
    scheduler_with_patch.step = mine
    for one in (scheduler, scheduler_with_patch):
        expected = inspect.signature(one.step)
        with pytest.raises(KeyError), replaced_step(one, lambda step: lambda *args: "wrapped"):
            assert one.step() == "wrapped"
            assert inspect.signature(one.step) == expected
            raise KeyError
    assert scheduler_with_patch.step is mine
    assert "step" not in vars(scheduler) and inspect.signature(scheduler.step) == signature


def test_more_steps_than_the_schedule_has_timesteps_are_told(pipeline: Any) -> None:
    trained = pipeline.scheduler.config.num_train_timesteps
    with pytest.raises(OctavoError, match=rf"^steps: {trained + 1:,} is more than the {trained:,} timesteps"):
        run(pipeline, 0, 1, steps=trained + 1)

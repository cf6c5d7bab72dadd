"""A text-to-image model used for another task, its LoRA, and its other networks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from tiny_families import build

import octavo
from octavo.checkpoint.task import recorded_task
from octavo.diffusion import probe
from octavo.errors import OctavoError
from octavo.evaluation.generate import sample
from octavo.quantization import quantized_layers

RECIPE = octavo.PTQ4DM(samples=3, steps=3)
LORA = {"r": 2, "lora_alpha": 8, "target_modules": ["to_q", "to_v"], "init_lora_weights": False}


@pytest.fixture(scope="module")
def inputs() -> dict[str, Any]:
    return build("sd")[1]


@pytest.fixture(scope="module")
def quantized(inputs: dict[str, Any]) -> Any:
    return octavo.quantize(build("sd")[0], RECIPE, batch_size=3, inputs=inputs, progress=False)


@pytest.fixture(scope="module")
def folder(quantized: Any, tmp_path_factory: Any) -> Path:
    place: Path = tmp_path_factory.mktemp("task") / "int8"
    quantized.save_pretrained(place)
    return place


def with_lora() -> Any:
    from peft import LoraConfig

    pipeline, _ = build("sd")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        pipeline.unet.add_adapter(LoraConfig(**LORA))
    return pipeline


def evaluated(unet: Any, rows: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x, states = (torch.randn(size, generator=generator) for size in ((rows, 4, 8, 8), (rows, 16, 32)))
    with torch.no_grad():
        output: torch.Tensor = unet(x, 500, encoder_hidden_states=states).sample
    return output


def test_the_card_and_the_configuration_tell_the_task(folder: Path, quantized: Any) -> None:
    assert "| calibrated for | text-to-image |" in (folder / "README.md").read_text()
    assert recorded_task(quantized.unet) == "text-to-image"


def test_its_own_task_is_silent_and_another_is_told_in_one_line(folder: Path, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, "octavo"):
        loaded = octavo.load(folder)
        assert not [record for record in caplog.records if record.name.startswith("octavo")]
        for use in (
            lambda: StableDiffusionImg2ImgPipeline.from_pretrained(folder),
            lambda: StableDiffusionImg2ImgPipeline(**loaded.components, requires_safety_checker=False),
        ):
            caplog.clear()
            use()
            (record,) = [record for record in caplog.records if record.name.startswith("octavo")]
            assert "unet was calibrated for text-to-image, not for image-to-image" in record.getMessage()
            assert "\n" not in record.getMessage()


def _told(caplog: Any, use: Callable[[], object]) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "octavo"):
        use()
    return [record.getMessage() for record in caplog.records if record.name == "octavo.checkpoint.task"]


def test_a_network_that_a_pipeline_is_given_later_is_told_and_so_is_accelerating_it(
    quantized: Any, caplog: Any
) -> None:
    pipeline, inputs = build("img2img")
    (line,) = _told(caplog, lambda: setattr(pipeline, "unet", quantized.unet))
    assert "unet was calibrated for text-to-image, not for image-to-image" in line
    (line,) = _told(caplog, lambda: octavo.accelerate(pipeline, precision="f32", batch_size=3, inputs=inputs))
    assert "unet was calibrated for text-to-image, not for image-to-image" in line
    own, _ = build("sd")
    assert not _told(caplog, lambda: setattr(own, "unet", quantized.unet))
    assert not _told(caplog, lambda: setattr(own, "vae", pipeline.vae))


def test_controlnet_is_another_task(quantized: Any, caplog: Any) -> None:
    steered, inputs = build("controlnet")
    (line,) = _told(caplog, lambda: setattr(steered, "unet", quantized.unet))
    assert "calibrated for text-to-image, not for text-to-image with ControlNet" in line
    made = octavo.quantize(build("controlnet")[0], RECIPE, batch_size=3, inputs=inputs, progress=False)
    assert recorded_task(made.unet) == "text-to-image with ControlNet"
    own, _ = build("sd")
    (line,) = _told(caplog, lambda: setattr(own, "unet", made.unet))
    assert "calibrated for text-to-image with ControlNet, not for text-to-image" in line


def test_a_run_from_an_image_counts_only_the_steps_that_it_makes() -> None:
    pipeline, inputs = build("img2img")
    found = probe(pipeline, num_inference_steps=10, inputs={**inputs, "strength": 0.4})
    assert found.num_steps == len(found.timesteps) == 4 and max(found.timesteps) < 400
    assert found.skipped == 6 and probe(pipeline, num_inference_steps=10, inputs=inputs).skipped == 0
    octavo.quantize(
        pipeline,
        octavo.PTQ4DM(samples=4, steps=4, timesteps="uniform"),
        batch_size=2,
        inputs={**inputs, "strength": 0.5},
        progress=False,
    )


def test_a_run_from_an_image_that_makes_no_step_is_told() -> None:
    pipeline, inputs = build("img2img")
    with pytest.raises(
        octavo.OctavoError, match=r"steps: 2 at a strength of 0\.4 leave none to make; give 3"
    ):
        probe(pipeline, num_inference_steps=2, inputs={**inputs, "strength": 0.4})
    assert probe(pipeline, num_inference_steps=3, inputs={**inputs, "strength": 0.4}).num_steps == 1


def test_a_run_that_ends_early_counts_only_the_steps_that_it_makes() -> None:
    pipeline, inputs = build("sdxl")
    found = probe(pipeline, num_inference_steps=10, inputs={**inputs, "denoising_end": 0.5})
    assert found.num_steps == len(found.timesteps) == 5 and min(found.timesteps) > 450


def test_a_misspelt_input_is_told_though_the_call_takes_any_keyword(inputs: dict[str, Any]) -> None:
    pipeline = build("sd")[0]
    with pytest.raises(OctavoError, match="StableDiffusionPipeline takes no guidence_scale; leave it out"):
        sample(pipeline, 0, 1, steps=1, seed=0, inputs={**inputs, "guidence_scale": 7})
    with pytest.raises(OctavoError, match=r"guidance_scale: 'much' is text; .* has 7\.5 by default"):
        sample(pipeline, 0, 1, steps=1, seed=0, inputs={**inputs, "guidance_scale": "much"})
    sample(pipeline, 0, 1, steps=1, seed=0, inputs={**inputs, "guidance_scale": 7})


def test_an_image_of_nan_is_told(inputs: dict[str, Any]) -> None:
    pipeline = build("sd")[0]
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias[0] = float("nan")
    with pytest.raises(
        OctavoError, match="image 3: holds NaN or infinity, which a component of the pipeline"
    ):
        sample(pipeline, 3, 2, steps=1, seed=0, inputs=inputs)


def test_the_cards_example_gives_what_the_call_needs(folder: Path) -> None:
    assert (
        'octavo.accelerate(pipeline, inputs={"prompt": "a photo of a cat"})'
        in (folder / "README.md").read_text()
    )


def test_a_missing_picture_is_told() -> None:
    pipeline, inputs = build("inpaint")
    del inputs["mask_image"]
    with pytest.raises(
        octavo.OctavoError, match=r"StableDiffusionInpaintPipeline needs mask_image \(--mask\)"
    ):
        probe(pipeline, num_inference_steps=3, inputs=inputs)


def test_a_fused_lora_is_quantized_with_the_weights(inputs: dict[str, Any], tmp_path: Path) -> None:
    plain, pipeline = build("sd")[0], with_lora()
    pipeline.fuse_lora()
    fused = evaluated(pipeline.unet)
    octavo.quantize(pipeline, RECIPE, batch_size=3, inputs=inputs, progress=False).save_pretrained(
        tmp_path / "int8"
    )
    loaded = octavo.load(tmp_path / "int8")
    error = (evaluated(loaded.unet) - fused).norm()
    assert error < 0.3 * (fused - evaluated(plain.unet)).norm()
    names = {name for name, _ in quantized_layers(loaded.unet)}
    assert any(name.endswith("to_q") for name in names) and not any("lora" in name for name in names)
    assert torch.equal(evaluated(pipeline.unet), fused), "the user's own pipeline keeps its LoRA"


def test_a_lora_of_the_text_encoder_is_saved_with_its_weights(inputs: dict[str, Any], tmp_path: Path) -> None:
    """transformers saves a network with a LoRA as the LoRA alone."""
    from peft import LoraConfig

    pipeline, plain = with_lora(), build("sd")[0]
    with torch.random.fork_rng():
        torch.manual_seed(2)
        pipeline.text_encoder.add_adapter(LoraConfig(**(LORA | {"target_modules": ["q_proj", "v_proj"]})))
    with pytest.raises(OctavoError, match="its text_encoder has a LoRA, of which a folder keeps"):
        unfused = octavo.quantize(plain, RECIPE, batch_size=3, inputs=inputs, progress=False)
        unfused.text_encoder = pipeline.text_encoder
        unfused.save_pretrained(tmp_path / "unfused")
    assert not (tmp_path / "unfused").exists()
    pipeline.fuse_lora(components=["unet"])
    with pytest.raises(
        OctavoError, match=r"its text_encoder has a LoRA that is not fused; call pipeline.fuse"
    ):
        octavo.quantize(pipeline, RECIPE, batch_size=3, inputs=inputs, progress=False)
    pipeline.fuse_lora(components=["text_encoder"])
    states = pipeline.encode_prompt("a red ball", "cpu", 1, False)[0]
    assert not torch.allclose(
        states, build("sd")[0].encode_prompt("a red ball", "cpu", 1, False)[0], atol=1e-3
    )
    quantized = octavo.quantize(pipeline, RECIPE, batch_size=3, inputs=inputs, progress=False)
    quantized.save_pretrained(tmp_path / "int8")
    loaded = octavo.load(tmp_path / "int8")
    assert torch.equal(loaded.encode_prompt("a red ball", "cpu", 1, False)[0], states)
    images = [sample(made, 0, 3, steps=2, seed=0, inputs=inputs) for made in (loaded, quantized)]
    assert (images[0] == images[1]).all()
    assert any("lora" in name for name, _ in pipeline.text_encoder.named_modules()), "the user's own keeps it"


def test_a_lora_that_is_not_fused_is_refused(inputs: dict[str, Any]) -> None:
    with pytest.raises(octavo.OctavoError, match="LoRA that is not fused; call"):
        octavo.quantize(with_lora(), RECIPE, inputs=inputs, progress=False)


def test_a_network_with_a_lora_is_accelerated_as_it_is_at_the_time(inputs: dict[str, Any]) -> None:
    """At its scale, and whether it is on: the cache keeps them apart. A further shape is converted from the same."""
    pipeline = with_lora()
    for layer in pipeline.unet.modules():
        if "lora" in type(layer).__module__:
            layer.train()  # as `load_lora_weights` leaves them
    outputs = []
    for scale in (1.0, 0.5, 0.0):
        if scale:
            pipeline.unet.set_adapters("default", scale)
        else:
            pipeline.unet.disable_adapters()
        expected = evaluated(pipeline.unet)
        fast = octavo.accelerate(pipeline, precision="f32", inputs=inputs)
        outputs.append(evaluated(fast.unet))
        torch.testing.assert_close(outputs[-1], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(evaluated(fast.unet, 3), evaluated(pipeline.unet, 3), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
    assert not torch.allclose(outputs[1], outputs[2], atol=1e-3)


def test_a_lora_for_an_accelerated_network_is_refused_in_one_line(
    inputs: dict[str, Any], tmp_path: Path
) -> None:
    """It was accepted, and images stayed as they were: the engine keeps the network as it was."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(with_lora().unet)
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=state)
    pipeline = build("sd")[0]
    fast = octavo.accelerate(pipeline, precision="f32", inputs=inputs)
    for load in (lambda: fast.load_lora_weights(tmp_path), lambda: fast.unet.add_adapter(LoraConfig(**LORA))):
        with pytest.raises(
            octavo.OctavoError, match=r"_adapter: this UNet2DConditionModel is accelerated as it was"
        ):
            load()
    pipeline.load_lora_weights(tmp_path)  # the original takes it


def test_a_dtype_for_a_quantized_pipeline_is_refused_before_anything_is_cast(
    quantized: Any, inputs: dict[str, Any]
) -> None:
    """Encoders and VAE are the original's too."""
    fast = octavo.accelerate(quantized, precision="f32", inputs=inputs)
    parts = ("text_encoder", "vae", "unet")
    for pipeline in (quantized, fast):
        for given in ({"dtype": torch.bfloat16}, {"device": "cpu", "dtype": torch.float16}):
            for cast in (lambda: pipeline.to(**given), lambda: pipeline.to(*given.values())):  # noqa: B023
                with pytest.raises(
                    octavo.OctavoError, match=r"^dtype: unet is quantized, and is not cast"
                ) as told:
                    cast()
                assert "\n" not in str(told.value)
                assert {getattr(pipeline, part).dtype for part in parts} == {torch.float32}
        assert pipeline.to("cpu") is pipeline


def test_a_lora_for_a_quantized_network_is_refused_in_one_line(quantized: Any, tmp_path: Path) -> None:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(with_lora().unet)
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=state)
    for load in (
        lambda: quantized.load_lora_weights(tmp_path),
        lambda: quantized.unet.add_adapter(LoraConfig(**LORA)),
    ):
        with pytest.raises(
            octavo.OctavoError, match=r"^LoRA: this UNet2DConditionModel is quantized, and takes none"
        ):
            load()
    build("sd")[0].load_lora_weights(tmp_path)  # diffusers' own way stays as it was


def test_fused_projections_are_refused_before_any_work(inputs: dict[str, Any]) -> None:
    """The folder said that it had layers which no network of its configuration has: saved, and never loaded."""
    pipeline = build("sd")[0]
    for change in (
        pipeline.fuse_qkv_projections,
        pipeline.unfuse_qkv_projections,
    ):  # which leaves the layers there
        change()
        with pytest.raises(
            octavo.OctavoError, match=r"has projections from fuse_qkv_projections.*load the pipeline"
        ):
            octavo.quantize(pipeline, RECIPE, inputs=inputs, progress=False)

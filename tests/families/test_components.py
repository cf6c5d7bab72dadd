"""The VAE quantized beside the denoiser: quantize, save, plain from_pretrained, accelerate, audit, parity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from command_line import run
from tiny_families import PROMPTS, build

import octavo
from octavo.calibration import parts
from octavo.calibration.components import in_float, recipe_of
from octavo.diffusion import call_pipeline, generators, part_calls
from octavo.quantization import quantized_layers


@dataclass
class Made:
    inputs: dict[str, Any]
    original: Any
    quantized: Any
    folder: Path
    loaded: Any
    fast: Any
    latents: torch.Tensor
    """Such as the full-precision pipeline's decoder reads; not those of the calibration."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> Made:
    original, inputs = build("dit")
    recipe = octavo.PTQ4DM(samples=4, steps=3, pairs_per_trajectory=1, rounding="gptq", balance=True)
    quantized = octavo.quantize(
        original,
        recipe,
        batch_size=2,
        inputs=inputs,
        components=("transformer", "vae"),
        progress=False,
    )
    folder = tmp_path_factory.mktemp("components") / "int8"
    quantized.save_pretrained(folder)
    loaded = diffusers.DiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    fast = octavo.accelerate(loaded, precision="f32", batch_size=3, inputs=inputs)
    (call,) = part_calls(
        original, original.vae.decoder, generators=generators(7, 0, 3), num_inference_steps=3, inputs=inputs
    )
    return Made(inputs, original, quantized, folder, loaded, fast, call.args["sample"])


def decoded(pipeline: Any, latents: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        images: torch.Tensor = pipeline.vae.decoder(latents)
    return images


def sample(pipeline: Any, inputs: dict[str, Any]) -> Any:
    return call_pipeline(
        pipeline, generators=generators(0, 0, 3), num_inference_steps=3, inputs=inputs, output_type="np"
    )


def test_the_decoder_is_quantized_and_the_original_is_not(made: Made) -> None:
    layers = dict(quantized_layers(made.quantized.vae))
    assert len(layers) > 10 and all(name.startswith("decoder.") for name in layers)
    assert "decoder.conv_in" not in layers and "decoder.conv_out" not in layers
    assert not list(quantized_layers(made.original.vae)) and made.original.vae.decoder is not None
    assert made.quantized.vae.encoder is made.original.vae.encoder
    assert type(made.quantized.vae) is type(made.original.vae)


def test_what_is_loaded_decodes_the_same_bits(made: Made) -> None:
    exact, quantized, loaded = (
        decoded(p, made.latents) for p in (made.original, made.quantized, made.loaded)
    )
    assert torch.equal(quantized, loaded)
    error = (quantized - exact).norm() / exact.norm()
    assert 0 < error < 0.1
    assert "| vae too |" in (made.folder / "README.md").read_text()
    stored = (made.folder / "vae" / "diffusion_pytorch_model.safetensors").stat().st_size
    made.original.vae.save_pretrained(made.folder.parent / "vae32")
    before = (made.folder.parent / "vae32" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert stored < before


def test_every_layer_runs_in_int8_and_is_named_behind_its_component(made: Made) -> None:
    rows = octavo.audit(made.fast)
    of_vae = [row.layer.removeprefix("vae.") for row in rows if row.layer.startswith("vae.decoder.")]
    assert set(of_vae) == set(dict(quantized_layers(made.loaded.vae)))
    assert len(rows) > len(of_vae) and all(row.ok for row in rows), [row for row in rows if not row.ok]
    assert {row.layer for row in octavo.audit(made.loaded)} == {row.layer for row in rows}


def test_the_executed_decoder_is_the_simulated_one(made: Made) -> None:
    exact, simulated, executed = (decoded(p, made.latents) for p in (made.original, made.loaded, made.fast))
    assert not torch.equal(simulated, executed)  # another engine did run
    assert (executed - simulated).norm() < 0.5 * (simulated - exact).norm()
    exact, simulated, executed = (sample(p, made.inputs) for p in (made.original, made.loaded, made.fast))
    assert np.linalg.norm(executed - simulated) < np.linalg.norm(simulated - exact)


def test_in_float_all_of_it_is_float_again(made: Made) -> None:
    plain = in_float(made.loaded)
    assert not list(quantized_layers(plain.vae)) and not list(quantized_layers(plain.transformer))
    exact, rounded = decoded(made.original, made.latents), decoded(plain, made.latents)
    assert 0 < (rounded - exact).norm() < (decoded(made.loaded, made.latents) - exact).norm()


def test_a_component_has_the_patterns_that_begin_with_its_name() -> None:
    recipe = octavo.PTQ4DM(
        include=("vae.decoder.*", "blocks.*"),
        exclude=("vae.*attn*",),
        bits={"blocks.0.*": (4, 8), "vae.decoder.up_blocks.*": (6, 8)},
        output_correction=True,
    )
    network, vae = recipe_of(recipe, None, ("vae",)), recipe_of(recipe, "vae", ("vae",))
    assert network.include == ("blocks.*",) and vae.include == ("*",)
    assert network.exclude == () and vae.exclude == ("*attn*",)
    assert dict(network.bits) == {"blocks.0.*": (4, 8)} and dict(vae.bits) == {"up_blocks.*": (6, 8)}
    assert network.output_correction and not vae.output_correction


def test_groups_of_weights_are_of_the_network_that_has_narrow_ones() -> None:
    of_vae = octavo.PTQ4DM(bits={"vae.decoder.*": (4, 8)}, group_size=32)
    assert recipe_of(of_vae, None, ("vae",)).group_size is None
    assert recipe_of(of_vae, "vae", ("vae",)).group_size == 32
    of_denoiser = octavo.PTQ4DM(bits={"blocks.0.*": (4, 8)}, group_size=32)
    assert recipe_of(of_denoiser, None, ("vae",)).group_size == 32
    assert recipe_of(of_denoiser, "vae", ("vae",)).group_size is None
    of_none = octavo.PTQ4DM(group_size=32)
    assert recipe_of(of_none, None, ("vae",)).group_size == 32, "and so is refused"


def test_patterns_of_another_component_alone_do_not_mean_the_whole_denoiser() -> None:
    with pytest.raises(octavo.OctavoError, match=r"include: vae\.\* leave no layer of the denoiser"):
        recipe_of(octavo.PTQ4DM(include=("vae.*",)), None, ("vae",))


def test_an_accelerated_pipeline_is_saved_as_it_was(made: Made, tmp_path: Path) -> None:
    made.fast.save_pretrained(tmp_path / "again")
    again = octavo.load(tmp_path / "again")
    assert torch.equal(decoded(again, made.latents), decoded(made.loaded, made.latents))


def test_a_damaged_vae_is_told(made: Made, tmp_path: Path) -> None:
    made.loaded.save_pretrained(tmp_path / "damaged")
    file = tmp_path / "damaged" / "vae" / "diffusion_pytorch_model.safetensors"
    contents = bytearray(file.read_bytes())
    contents[-1] ^= 1
    file.write_bytes(contents)
    with pytest.raises(octavo.OctavoError, match="not what Octavo saved"):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path / "damaged")


def test_a_killed_calibration_of_the_decoder_goes_on_to_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pipeline, inputs = build("dit")
    recipe = octavo.PTQ4DM(samples=3, steps=2, pairs_per_trajectory=1, metric="minmax")
    batches: list[int] = []

    def killed(*args: Any, first_image: int = 0, **kwargs: Any) -> Any:
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(len(kwargs["generators"]))
        return part_calls(*args, first_image=first_image, **kwargs)

    def quantize(folder: str) -> Any:
        return octavo.quantize(
            pipeline,
            recipe,
            batch_size=1,
            inputs=inputs,
            components=("transformer", "vae"),
            workdir=tmp_path / folder,
            progress=False,
        )

    whole = quantize("whole").vae.state_dict()
    monkeypatch.setattr(parts, "part_calls", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize("killed")
    assert batches == [1, 1]
    batches.clear()
    again = quantize("killed").vae.state_dict()
    assert batches == [1], "only what was missing is made"
    assert whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)


@pytest.mark.parametrize(
    ("family", "components", "message"),
    [
        ("sd", ("unet", "text_encoder"), "'text_encoder' is none that Octavo quantizes; .* unet, vae$"),
        ("sd", ("unet", "tokenizer"), "'tokenizer' is none that Octavo quantizes; .* unet, vae$"),
        ("sd", ("unet", "scheduler"), "'scheduler' is none"),
        ("sd", ("transformer",), "'transformer' is none"),
        ("sd", ("vae",), "components: unet is missing"),
        ("unconditional", ("unet", "vae"), "'vae' is none that Octavo quantizes; .* quantizes unet$"),
    ],
)
def test_what_cannot_be_quantized_is_refused(family: str, components: tuple[str, ...], message: str) -> None:
    pipeline, inputs = build(family)
    with pytest.raises(octavo.OctavoError, match=message):
        octavo.quantize(pipeline, octavo.PTQ4DM(samples=2, steps=2), inputs=inputs, components=components)


def test_the_command_line_quantizes_both_and_patterns_are_told_apart(tmp_path: Path, capsys: Any) -> None:
    build("sd")[0].save_pretrained(tmp_path / "sd")
    given = ["--recipe", "ptq4dm", "--samples", 2, "--steps", 2, "--prompt", PROMPTS[0]]
    given += ["--components", "unet,vae", "--exclude", "vae.decoder.mid_block.*", "--exclude", "mid_block.*"]
    code, out, err = run(capsys, "quantize", tmp_path / "sd", "--out", tmp_path / "int8", *given)
    assert code == 0, err
    assert "\nvae with " in out
    loaded = octavo.load(tmp_path / "int8")
    for network in (loaded.unet, loaded.vae):
        layers = [name for name, _ in quantized_layers(network)]
        assert len(layers) > 5 and not any("mid_block" in name for name in layers)
    code, _, err = run(
        capsys, "quantize", tmp_path / "sd", "--out", tmp_path / "b", *given, "--exclude", "vae.x"
    )
    assert code == 2 and "--exclude: 'vae.x' matches none" in err


def test_a_pair_limit_is_of_the_network_that_has_8_bit_weights() -> None:
    recipe = octavo.PTQ4DM(weights=4, pair_limit=True, bits={"vae.decoder.*": (8, 8)})
    assert not recipe_of(recipe, None, ("vae",)).pair_limit and recipe_of(recipe, "vae", ("vae",)).pair_limit

"""A tiny pipeline of real diffusers classes, quantized once for all tests."""

from __future__ import annotations

import os

# Read when triton is imported, which importing torch may do; "0" runs the tests of its kernels on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
)
from more import MORE

import octavo
from octavo.runtimes.saturation import adds_in_16_bits

COLLECTED = pytest.StashKey[frozenset[str]]()
"""The names of all tests that were collected, before some are left out."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what `make test` leaves to `make test-all`."""
    for item in items:
        if item.nodeid.removeprefix("tests/").startswith(tuple(MORE)):
            item.add_marker(pytest.mark.more)
    config.stash[COLLECTED] = frozenset(item.nodeid for item in items)


@pytest.fixture
def collected(pytestconfig: pytest.Config) -> frozenset[str]:
    return pytestconfig.stash[COLLECTED]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Octavo's cache, away from the user's."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["OCTAVO_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def make_pipeline() -> Callable[..., DDIMPipeline]:
    """Builds a DDIM pipeline of a 8x8 RGB U-Net with attention and seeded random weights."""

    def make(seed: int = 0, out_channels: int = 3, up: str = "UpBlock2D") -> DDIMPipeline:
        with torch.random.fork_rng():  # whatever test asks first, the global generator stays as it was
            torch.manual_seed(seed)
            unet = UNet2DModel(
                sample_size=8,
                in_channels=3,
                out_channels=out_channels,
                layers_per_block=1,
                block_out_channels=(32, 64),
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=(up, "UpBlock2D"),
                attention_head_dim=8,
                norm_num_groups=8,
            )
        pipeline = DDIMPipeline(unet=unet.eval(), scheduler=DDIMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture(scope="session")
def recipe() -> octavo.PTQ4DM:
    """As users are told to quantize on this CPU: one integer kernel a layer."""
    return octavo.PTQ4DM(samples=12, steps=4, pairs_per_trajectory=1, pair_limit=adds_in_16_bits())


@pytest.fixture(scope="session")
def pipeline(make_pipeline: Callable[..., DDIMPipeline]) -> DDIMPipeline:
    return make_pipeline()


@pytest.fixture(scope="session")
def quantized(pipeline: DDIMPipeline, recipe: octavo.PTQ4DM) -> DDIMPipeline:
    return octavo.quantize(pipeline, recipe, batch_size=4, progress=False)


@pytest.fixture(scope="session")
def unlimited(pipeline: DDIMPipeline, recipe: octavo.PTQ4DM) -> DDIMPipeline:
    """Quantized to any 8-bit weights, which take two integer kernels a layer on CPUs without VNNI."""
    return octavo.quantize(pipeline, replace(recipe, pair_limit=False), batch_size=4, progress=False)


@pytest.fixture(scope="session")
def attentive(pipeline: DDIMPipeline) -> DDIMPipeline:
    """Quantized with attention's products; weights of 7 bits are exact on every CPU's kernels."""
    recipe = octavo.PTQ4DM(weights=7, samples=8, steps=2, pairs_per_trajectory=2, attention_matmuls=True)
    return octavo.quantize(pipeline, recipe, batch_size=4, progress=False)


@pytest.fixture(scope="session")
def saved(quantized: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quantized pipeline's folder; read it, do not write to it."""
    folder = tmp_path_factory.mktemp("saved") / "tiny-int8"
    quantized.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def digits() -> DDIMPipeline:
    """The bundled, trained model, quantized on few pairs."""
    recipe = octavo.PTQ4DM(samples=16, steps=10, pair_limit=adds_in_16_bits())
    return octavo.quantize(octavo.load("digits"), recipe, progress=False)


@pytest.fixture(scope="session")
def fast_digits(digits: DDIMPipeline) -> DDIMPipeline:
    return octavo.accelerate(digits, precision="f32")


@pytest.fixture(scope="session")
def dit() -> DiTPipeline:
    """A tiny class-conditional, guided transformer that works on latents."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
    )
    torch.nn.init.normal_(transformer.proj_out_2.weight, std=0.1)
    vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8)
    pipeline = DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from diffusers import DDPMScheduler
from torch import nn

from octavo.diffusion import find_denoiser
from octavo.errors import OctavoError


def test_finds_unet_and_transformer(ddpm: Any, dit: Any) -> None:
    for name, pipeline in (("unet", ddpm(DDPMScheduler())), ("transformer", dit(DDPMScheduler()))):
        assert find_denoiser(pipeline) == (name, getattr(pipeline, name))


def test_prefers_the_network_of_the_loop() -> None:
    prior, decoder = nn.Identity(), nn.Identity()
    assert find_denoiser(SimpleNamespace(decoder=decoder, prior=prior, unet=None))[1] is prior


def test_no_network() -> None:
    with pytest.raises(
        OctavoError, match="SimpleNamespace holds no torch network under any of unet, transformer"
    ):
        find_denoiser(SimpleNamespace(vae=nn.Identity(), unet="unet"))


def test_two_networks_in_turn_are_refused() -> None:
    pipeline: Any = SimpleNamespace(transformer=nn.Identity(), transformer_2=nn.Identity())
    with pytest.raises(
        OctavoError, match="denoises with two networks, transformer and transformer_2"
    ) as told:
        find_denoiser(pipeline)
    assert "\n" not in str(told.value)
    pipeline.transformer_2 = None  # Wan 2.1
    assert find_denoiser(pipeline) == ("transformer", pipeline.transformer)

"""The whole network and its outer part are the network, cut where they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from diffusers import (
    DiTTransformer2DModel,
    SD3Transformer2DModel,
    UNet1DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn

from octavo.errors import OctavoError
from octavo.runtimes.reuse.networks import DEEP, LeftOut, most_depth, recording, reusing


def _unet() -> tuple[nn.Module, dict[str, Any]]:
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )
    return unet.eval(), {"sample": torch.randn(2, 1, 8, 8), "timestep": torch.tensor(7)}


def _conditional() -> tuple[nn.Module, dict[str, Any]]:
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=12,
    )
    given = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(7)}
    return unet.eval(), {**given, "encoder_hidden_states": torch.randn(2, 3, 12)}


def _transformer() -> tuple[nn.Module, dict[str, Any]]:
    dit = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=4,
        num_layers=5,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    for parameter in dit.parameters():  # its last layers start at zero
        nn.init.normal_(parameter, std=0.1)
    given = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([7, 7])}
    return dit.eval(), {**given, "class_labels": torch.tensor([1, 2])}


MODELS = {"unet": (_unet, 9), "conditional": (_conditional, 4), "transformer": (_transformer, 2)}


@torch.no_grad()
def test_a_network_that_is_offloaded_is_cut_as_it_is() -> None:
    """Its hooks' own forward stood before that of the cut one, which so was the plain network."""
    network, given = _unet()
    add_hook_to_module(network, CpuOffload("cpu"))
    output, deep = recording(network, 4)(**given)
    assert torch.equal(output, network(**given).sample) and deep.shape[0] == 2
    (again,) = reusing(network, 4)(**given, **{DEEP: deep})
    torch.testing.assert_close(again, output)


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_with_its_own_features_the_outer_part_is_the_network(kind: str) -> None:
    torch.manual_seed(0)
    build, most = MODELS[kind]
    network, given = build()
    expected = network(**given, return_dict=False)[0]
    later = {**given, next(iter(given)): next(iter(given.values())) + 0.1}
    assert most_depth(network) == most
    computed = []
    for depth in range(1, most + 1):
        whole, outer = recording(network, depth), reusing(network, depth)
        output, deep = whole(**given)
        assert torch.equal(output, expected)
        assert torch.allclose(outer(**given, **{DEEP: deep})[0], expected, atol=1e-6)
        old = outer(**later, **{DEEP: deep})[0]
        assert not torch.allclose(old, expected, atol=1e-6), "what is computed anew must matter"
        assert not torch.allclose(old, network(**later, return_dict=False)[0], atol=1e-6)
        assert dict(whole.named_parameters()).keys() == dict(network.named_parameters()).keys()
        assert isinstance(whole, type(network)) and isinstance(outer, type(network))
        computed.append(sum(p.numel() for p in outer.parameters()))
    assert computed == sorted(computed) and computed[-1] < sum(p.numel() for p in network.parameters())
    assert torch.equal(network(**given, return_dict=False)[0], expected)
    assert not any(isinstance(module, LeftOut) for module in network.modules())


@pytest.mark.parametrize("depth", [0, 10])
def test_a_depth_that_leaves_nothing_is_refused(depth: int) -> None:
    network, _ = _unet()
    for make in (recording, reusing):
        with pytest.raises(OctavoError, match=f"depth: {depth} is not between 1 and 9"):
            make(network, depth)


def test_networks_that_cannot_be_cut_are_refused() -> None:
    skipping = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("SkipDownBlock2D", "SkipDownBlock2D"),
        up_block_types=("SkipUpBlock2D", "SkipUpBlock2D"),
        norm_num_groups=4,
    )
    joint = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=8,
    )
    flat = UNet1DModel(sample_size=16, block_out_channels=(8, 8, 8))
    for network in (skipping, joint, flat, nn.Linear(2, 2)):
        with pytest.raises(OctavoError, match="cannot be cut"):
            most_depth(network)


def test_what_comes_from_outside_is_refused() -> None:
    network, given = _conditional()
    whole = recording(network, 1)
    with pytest.raises(OctavoError, match="down_block_additional_residuals: what ControlNet"):
        whole(**given, down_block_additional_residuals=(torch.zeros(1),))

"""Architectures to time by name, with seeded random weights: speed does not depend on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import nn

from octavo.errors import OctavoError

TOKENS = 77
"""Of the text states that Stable Diffusion reads; their width is in the network's configuration."""
POOLED, SIZES = 1280, 6
"""What Stable Diffusion XL reads besides: the width of the pooled text, and how many sizes and places of crops."""


class BarePipeline(DiffusionPipeline):
    """A network and a scheduler, no decoder: what its call returns are latents, its conditions are drawn from seeds."""

    def __init__(self, unet: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Any = None,
        num_inference_steps: int = 50,
        output_type: str = "pt",
        return_dict: bool = True,
    ) -> Any:
        """Denoise `batch_size` latents, image k by generator k."""
        unet: Any = self.unet
        config = unet.config
        generators = generator if isinstance(generator, list) else [generator] * batch_size
        shape = (1, config.in_channels, config.sample_size, config.sample_size)
        latents = torch.cat([torch.randn(shape, generator=g) for g in generators])
        given: dict[str, Any] = {}
        if isinstance(unet, UNet2DConditionModel):
            text = (1, TOKENS, config.cross_attention_dim)
            given["encoder_hidden_states"] = torch.cat([torch.randn(text, generator=g) for g in generators])
            if config.addition_embed_type == "text_time":
                given["added_cond_kwargs"] = {
                    "text_embeds": torch.cat([torch.randn(1, POOLED, generator=g) for g in generators]),
                    "time_ids": torch.full((batch_size, SIZES), 8.0 * config.sample_size),
                }
        if isinstance(unet, DiTTransformer2DModel):
            labels = [torch.randint(config.num_embeds_ada_norm, (1,), generator=g) for g in generators]
            given["class_labels"] = torch.cat(labels)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            timestep = t.expand(batch_size) if "class_labels" in given else t
            output = unet(latents, timestep=timestep, **given, return_dict=False)[0]
            latents = self.scheduler.step(output[:, : config.in_channels], t, latents).prev_sample
        images = latents if output_type == "pt" else latents.permute(0, 2, 3, 1).numpy()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _ddpm_cifar10() -> nn.Module:
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )


def _dit_s_2() -> nn.Module:
    return DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=4,
        out_channels=8,
        num_layers=12,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )


def _sd15() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=32,
        cross_attention_dim=768,
        attention_head_dim=8,
        block_out_channels=(320, 640, 1280, 1280),
    )


def _sdxl() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20],
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=POOLED + SIZES * 256,
    )


ARCHITECTURES: Mapping[str, Callable[[], nn.Module]] = {
    "ddpm-cifar10": _ddpm_cifar10,
    "dit-s-2": _dit_s_2,
    "sd15": _sd15,
    "sdxl": _sdxl,
}
"""The DDPM CIFAR-10 U-Net (35.7 M parameters, 32x32 pixels), DiT-S/2 (40 M as diffusers builds it), and the U-Nets of
Stable Diffusion 1.5 (860 M) and XL (2.6 B), all three on 32x32 latents."""


def architecture(name: str, seed: int = 0) -> DiffusionPipeline:
    """The architecture of that name under DDIM. Raises `OctavoError` for another name."""
    if name not in ARCHITECTURES:
        raise OctavoError(f"architecture: {name!r} is not one of {', '.join(ARCHITECTURES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ARCHITECTURES[name]()
    pipeline = BarePipeline(network.eval(), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

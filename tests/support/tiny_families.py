"""Real pipelines of diffusers at tiny random size, built from configuration alone: tokenizers, encoders, networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    AutoencoderKLTemporalDecoder,
    ControlNetModel,
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    StableVideoDiffusionPipeline,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UNet3DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from PIL import Image

Families = dict[str, tuple[Callable[[], Any], dict[str, Any]]]
WORDS = ("a", "cat", "dog", "red", "blue", "on", "mars", "of", "two", "hats")
PROMPTS = ["a red cat", "two dogs on mars", "a hat"]
WIDTH, LENGTH = 32, 16  # of every text encoder's states
DDIM = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "clip_sample": False,
}


def picture(seed: int, mode: str = "RGB", size: int = 16) -> Image.Image:
    """A picture of noise; in mode "L" a mask whose left half is white."""
    if mode == "L":
        mask = Image.new("L", (size, size), 0)
        mask.paste(255, (0, 0, size // 2, size))
        return mask
    noise = torch.randint(0, 256, (size, size, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.to(torch.uint8).numpy())


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for letter in "abcdefghijklmnopqrstuvwxyz":
        vocabulary[letter] = len(vocabulary)
        vocabulary[f"{letter}</w>"] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=LENGTH)


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -1.0) for word in WORDS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=LENGTH)


def clip_encoder(projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=32,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5_encoder(width: int = WIDTH, family: str = "T5") -> Any:
    import transformers

    config, kind = (getattr(transformers, f"{family}{name}") for name in ("Config", "EncoderModel"))
    return kind(
        config(vocab_size=64, d_model=width, d_kv=16, d_ff=32, num_layers=1, num_heads=2, use_cache=False)
    )


def vae(channels: int = 4, **kwargs: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **kwargs,
    )


def unet(**kwargs: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D"),
            "cross_attention_dim": WIDTH,
            "attention_head_dim": 16,
            **kwargs,
        }
    )


def stable_diffusion(kind: Any = StableDiffusionPipeline, in_channels: int = 4, **more: Any) -> Any:
    return kind(
        vae=vae(),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        unet=unet(in_channels=in_channels),
        scheduler=DDIMScheduler(**DDIM),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **more,
    )


def unconditional() -> Any:
    network = UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    # little noise: from more, an untrained network's images are black and white, and a rounding decides which
    return DDIMPipeline(network, DDIMScheduler(beta_end=0.002, clip_sample=False))


def text_to_image() -> Any:
    return stable_diffusion()


def image_to_image() -> Any:
    return stable_diffusion(StableDiffusionImg2ImgPipeline)


def inpainting() -> Any:
    return stable_diffusion(StableDiffusionInpaintPipeline, in_channels=9)


def controlnet() -> Any:
    control = ControlNetModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=16,
        conditioning_embedding_out_channels=(8, 8),
    )
    for block in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.2)  # zero before training
    return stable_diffusion(StableDiffusionControlNetPipeline, controlnet=control)


def sdxl() -> Any:
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip_encoder(),
        text_encoder_2=clip_encoder(projected=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet(
            cross_attention_dim=2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        ),
        scheduler=DDIMScheduler(**DDIM),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def dit() -> Any:
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
    )
    torch.nn.init.normal_(transformer.proj_out_2.weight, std=0.1)  # zero before training
    return DiTPipeline(transformer, vae(), DDIMScheduler())


def pixart() -> Any:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    )
    return PixArtAlphaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=vae(),
        transformer=transformer,
        scheduler=DDIMScheduler(),
    )


def sd3() -> Any:
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=8,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.06),
        text_encoder=clip_encoder(projected=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(projected=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(2 * WIDTH),
        tokenizer_3=t5_tokenizer(),
    )


def flux() -> Any:
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            num_attention_heads=2,
            attention_head_dim=16,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(shift_factor=0.06),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
    )


def ltx() -> Any:
    """A video model: two latent frames."""
    return LTXPipeline(
        transformer=LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=WIDTH,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLLTXVideo(
            latent_channels=4,
            block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8,) * 4,
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 5,
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            patch_size=1,
        ),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
    )


def video_unet() -> Any:
    """A video U-Net: convolutions over space, then over time (Conv3d); two frames."""
    network = UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(32,),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock3D",),
        up_block_types=("UpBlock3D",),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
    )
    for name, parameter in network.named_parameters():
        if ".conv4." in name:
            torch.nn.init.normal_(parameter, std=0.02)  # zero before training
    return TextToVideoSDPipeline(vae(), clip_encoder(), clip_tokenizer(), network, DDIMScheduler(**DDIM))


def svd() -> Any:
    """From a picture to a video; its layers embed the frames' numbers, which no input changes."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32,
            projection_dim=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=224,
            patch_size=56,
        )
    )
    network = UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(32,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal",),
        up_block_types=("UpBlockSpatioTemporal",),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=3 * 8,
        cross_attention_dim=WIDTH,
        num_attention_heads=2,
        num_frames=2,
    )
    decoder = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
        sample_size=16,
    )
    # less noise than the 700 of the released one, from which an untrained network's roundings fill the images
    scheduler = EulerDiscreteScheduler(
        prediction_type="v_prediction",
        timestep_type="continuous",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=14.0,
    )
    processor = CLIPImageProcessor(size=224, crop_size=224)
    return StableVideoDiffusionPipeline(decoder, encoder, network, scheduler, processor)


PICTURES = [picture(0), picture(1), picture(2)]
FAMILIES: Families = {
    "unconditional": (unconditional, {}),
    "sd": (text_to_image, {"prompt": PROMPTS}),
    "img2img": (image_to_image, {"prompt": PROMPTS, "image": PICTURES, "strength": 1.0}),
    "inpaint": (
        inpainting,
        {"prompt": PROMPTS, "image": PICTURES, "mask_image": picture(0, "L"), "height": 16, "width": 16},
    ),
    "controlnet": (controlnet, {"prompt": PROMPTS, "image": PICTURES}),
    "sdxl": (sdxl, {"prompt": PROMPTS}),
    "dit": (dit, {"class_labels": [1, 5, 7]}),
    "pixart": (pixart, {"prompt": PROMPTS, "use_resolution_binning": False, "clean_caption": False}),
    "sd3": (sd3, {"prompt": PROMPTS, "max_sequence_length": LENGTH}),
    "ltx": (
        ltx,
        {"prompt": PROMPTS, "height": 32, "width": 32, "num_frames": 5, "max_sequence_length": LENGTH},
    ),
    "video_unet": (
        video_unet,
        {"prompt": PROMPTS, "height": 16, "width": 16, "num_frames": 2, "guidance_scale": 2.0},
    ),
    "svd": (
        svd,
        {"image": PICTURES, "height": 16, "width": 16, "num_frames": 2, "max_guidance_scale": 2.0},
    ),
    "flux": (flux, {"prompt": PROMPTS, "height": 16, "width": 16, "max_sequence_length": LENGTH}),
}


def build(family: str, among: Families = FAMILIES) -> tuple[Any, dict[str, Any]]:
    """The family's pipeline with seeded random weights, and inputs of three images for it."""
    make, inputs = among[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = make()
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, dict(inputs)

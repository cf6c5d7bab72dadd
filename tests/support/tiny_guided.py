"""Pipelines that guide by two calls of the network at each step, at tiny size, as in `tiny_families`."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tiny_families import FAMILIES, LENGTH, PROMPTS, WIDTH, Families, flux, t5_encoder, t5_tokenizer, vae

CAUSAL_VAE: dict[str, Any] = {
    "z_dim": 4,
    "dim_mult": [1] * 4,
    "num_res_blocks": 1,
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}


def wan() -> Any:
    """A video model of whole timesteps: two latent frames."""
    return WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(family="UMT5"),
        vae=AutoencoderKLWan(base_dim=4, **CAUSAL_VAE),
        transformer=WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=WIDTH,
            freq_dim=32,
            ffn_dim=64,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        scheduler=UniPCMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        ),
    )


def qwen_image() -> Any:
    """Prompts are as long as the longest of their batch; the text states of the last block are read by nothing."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = {
        "vocab_size": 300,
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": rope,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
    }
    letters = {letter: k for k, letter in enumerate(sorted(ByteLevel.alphabet()))}
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage(base_dim=8, **CAUSAL_VAE),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        ),
        tokenizer=Qwen2Tokenizer(vocab=letters, merges=[]),
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
        ),
    )


def chroma() -> Any:
    """Its network makes constants of the number of rows."""
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.06),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=16,
            approximator_hidden_dim=32,
            approximator_layers=1,
        ),
    )


def lumina2() -> Any:
    """Turns channels by complex numbers, and cuts its texts to the lengths that it reads in their masks."""
    from transformers import Gemma2Config, Gemma2Model

    encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=64,
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        )
    )
    return Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=4,
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 6, 6),
            axes_lens=(64, 32, 32),
            cap_feat_dim=WIDTH,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.06),
        text_encoder=encoder,
        tokenizer=t5_tokenizer(),
    )


NEGATIVE = ["a dog", "two hats", "blue"]
GUIDED: Families = {
    "flux": (flux, {**FAMILIES["flux"][1], "negative_prompt": NEGATIVE, "true_cfg_scale": 3.0}),
    "wan": (
        wan,
        {
            "prompt": PROMPTS,
            "negative_prompt": NEGATIVE,
            "height": 16,
            "width": 16,
            "num_frames": 5,
            "max_sequence_length": LENGTH,
        },
    ),
    "qwen_image": (
        qwen_image,
        {
            "prompt": PROMPTS,
            "negative_prompt": NEGATIVE,
            "true_cfg_scale": 3.0,
            "height": 32,
            "width": 32,
            "max_sequence_length": 512,
        },
    ),
    "lumina2": (
        lumina2,
        {
            "prompt": PROMPTS,
            "negative_prompt": NEGATIVE,
            "system_prompt": "a",
            "height": 64,
            "width": 64,
            "max_sequence_length": LENGTH,
        },
    ),
    "chroma": (
        chroma,
        {
            "prompt": PROMPTS,
            "negative_prompt": NEGATIVE,
            "height": 16,
            "width": 16,
            "max_sequence_length": LENGTH,
        },
    ),
}
"""Guided sequentially: the network is called twice at each step, with the prompts and with the negative ones."""

"""LoRA in a pipeline that is to be quantized: what is fused is kept as weights, what is not is refused."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from octavo.diffusion import find_denoiser
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def without_adapters(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline with a denoiser of plain layers, which hold what was fused into them; tensors are shared.

    `pipeline` itself stays as it was, and is returned if its denoiser has no adapters. Raises `OctavoError` if one is
    not fused: its two thin matrices would run in float beside every layer, or be lost.
    """
    component, denoiser = find_denoiser(pipeline)
    adapters = adapted_layers(denoiser)
    if not adapters:
        return pipeline
    if not all(layer.merged for layer in adapters):
        raise OctavoError(
            f"pipeline: its {component} has a LoRA that is not fused; call pipeline.fuse_lora() first, then quantize"
        )
    tensors = [*denoiser.parameters(), *denoiser.buffers()]
    plain: Any = copy.deepcopy(denoiser, {id(tensor): tensor for tensor in tensors})
    plain.unload_lora()
    other = copy.copy(pipeline)
    other.__dict__.pop("save_pretrained", None)  # bound to the pipeline it was copied from
    setattr(other, component, plain)
    return other


def adapted_layers(network: nn.Module) -> list[Any]:
    """The layers of `network` that peft has wrapped."""
    return [
        module
        for module in network.modules()
        if type(module).__module__.partition(".")[0] == "peft" and hasattr(module, "base_layer")
    ]

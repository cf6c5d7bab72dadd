"""What people have put around a network before they quantize it, taken off again: a fused LoRA, torch.compile."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from octavo.diffusion import find_denoiser
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def unwrapped(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline with a denoiser of plain layers under their own names, not compiled; tensors are shared.

    The layers hold what was fused into them. `pipeline` itself stays as it was, and is returned if there is nothing to
    take off. Raises `OctavoError` for a LoRA that is not fused: its two thin matrices would run in float beside every
    layer, or be lost; and for projections of attention that are (`fuse_qkv_projections`): a configuration does not say.
    """
    component, given = find_denoiser(pipeline)
    denoiser = getattr(given, "_orig_mod", given)  # what torch.compile wraps
    if any(getattr(module, "fused_projections", False) for module in denoiser.modules()):
        raise OctavoError(
            f"pipeline: its {component} has projections from fuse_qkv_projections(), which no folder loads again (to "
            "unfuse leaves them there); load the pipeline again, and quantize that"
        )
    adapters = adapted_layers(denoiser)
    if not adapters:
        return pipeline if denoiser is given else _holding(pipeline, component, denoiser)
    if not all(layer.merged for layer in adapters):
        raise OctavoError(
            f"pipeline: its {component} has a LoRA that is not fused; call pipeline.fuse_lora() first, then quantize"
        )
    tensors = [*denoiser.parameters(), *denoiser.buffers()]
    plain: Any = copy.deepcopy(denoiser, {id(tensor): tensor for tensor in tensors})
    plain.unload_lora()
    return _holding(pipeline, component, plain)


def _holding(pipeline: DiffusionPipeline, component: str, denoiser: nn.Module) -> DiffusionPipeline:
    other = copy.copy(pipeline)
    other.__dict__.pop("save_pretrained", None)  # bound to the pipeline it was copied from
    setattr(other, component, denoiser)
    return other


def adapted_layers(network: nn.Module) -> list[Any]:
    """The layers of `network` that peft has wrapped."""
    return [
        module
        for module in network.modules()
        if type(module).__module__.partition(".")[0] == "peft" and hasattr(module, "base_layer")
    ]

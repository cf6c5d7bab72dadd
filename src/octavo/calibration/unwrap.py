"""What people have put around a network before they quantize it, taken off again: a fused LoRA, torch.compile."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from octavo.diffusion import find_denoiser
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def unwrapped(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline with a denoiser of plain layers under their own names, not compiled; tensors are shared.

    The layers hold what was fused into them, and so do those of text encoders, whose folders would hold the LoRA alone.
    `pipeline` itself stays as it was, and is returned if there is nothing to take off. Raises `OctavoError` for a LoRA
    that is not fused: its two thin matrices would run in float beside every layer, or be lost; and for projections of
    attention that are (`fuse_qkv_projections`): a configuration does not say.
    """
    component, given = find_denoiser(pipeline)
    denoiser = getattr(given, "_orig_mod", given)  # what torch.compile wraps
    if any(getattr(module, "fused_projections", False) for module in denoiser.modules()):
        raise OctavoError(
            f"pipeline: its {component} has projections from fuse_qkv_projections(), which no folder loads again (to "
            "unfuse leaves them there); load the pipeline again, and quantize that"
        )
    adapted = {component: denoiser, **dict(adapted_components(pipeline))}
    found = {name: adapted_layers(network) for name, network in adapted.items()}
    for name, layers in found.items():
        if not all(layer.merged for layer in layers):
            raise OctavoError(
                f"pipeline: its {name} has a LoRA that is not fused; call pipeline.fuse_lora(components=[{name!r}]) "
                "first, then quantize"
            )
    plain = {name: _without_lora(network) if found[name] else network for name, network in adapted.items()}
    if plain == {component: given}:
        return pipeline
    return _holding(pipeline, plain)


def adapted_components(pipeline: DiffusionPipeline) -> Iterator[tuple[str, nn.Module]]:
    """(name, network) for each of a pipeline's components that has a LoRA, fused or not."""
    for name, network in pipeline.components.items():
        network = getattr(network, "_orig_mod", network)
        if isinstance(network, nn.Module) and adapted_layers(network):
            yield name, network


def _without_lora(network: nn.Module) -> nn.Module:
    """A copy whose layers are plain ones; diffusers' networks and transformers' mark one as adapted alike."""
    from diffusers.utils import recurse_remove_peft_layers

    tensors = [*network.parameters(), *network.buffers()]
    plain: Any = copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})
    recurse_remove_peft_layers(plain)
    plain.__dict__.pop("peft_config", None)
    plain._hf_peft_config_loaded = False
    return cast(nn.Module, plain)


def _holding(pipeline: DiffusionPipeline, components: Mapping[str, nn.Module]) -> DiffusionPipeline:
    other = copy.copy(pipeline)
    other.__dict__.pop("save_pretrained", None)  # bound to the pipeline it was copied from
    for name, network in components.items():
        setattr(other, name, network)
    return other


def adapted_layers(network: nn.Module) -> list[Any]:
    """The layers of `network` that peft has wrapped."""
    return [
        module
        for module in network.modules()
        if type(module).__module__.partition(".")[0] == "peft" and hasattr(module, "base_layer")
    ]

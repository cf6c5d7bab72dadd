"""Which component of a diffusers pipeline is the network that denoises."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from octavo.errors import OctavoError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# In order: a pipeline that holds two of them (a prior and its decoder) calls the earlier one in its loop.
COMPONENTS = ("unet", "transformer", "prior", "decoder")


def find_denoiser(pipeline: DiffusionPipeline) -> tuple[str, nn.Module]:
    """The component's name in the pipeline and the network itself: `("unet", UNet2DModel(...))`.

    Raises OctavoError if the pipeline holds no torch module under any of the COMPONENTS names, or denoises with one
    network after the other (`transformer_2`: Wan 2.2), of which only one would be calibrated.
    """
    for name in COMPONENTS:
        module = getattr(pipeline, name, None)
        if isinstance(module, nn.Module):
            if isinstance(getattr(pipeline, f"{name}_2", None), nn.Module):
                raise OctavoError(
                    f"pipeline: {type(pipeline).__name__} denoises with two networks, {name} and {name}_2, and Octavo "
                    "takes pipelines with one; Wan 2.1 has one"
                )
            return name, module
    raise OctavoError(
        f"pipeline: {type(pipeline).__name__} holds no torch network under any of {', '.join(COMPONENTS)}"
    )


def check_rows_alone(pipeline: DiffusionPipeline) -> None:
    """Raise OctavoError for a pipeline whose network treats rows by their place in the batch.

    Perturbed attention guidance does: a third of the rows, or half. Calibration pairs and an engine's parts of a batch
    are cut otherwise.
    """
    if any(kind.__name__ == "PAGMixin" for kind in type(pipeline).__mro__):
        raise OctavoError(
            f"pipeline: {type(pipeline).__name__} perturbs attention in part of a batch's rows, and Octavo cuts "
            "batches into rows; take the pipeline without PAG"
        )


def call_arguments(network: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`kwargs` by which the network returns plain tensors: without `return_dict`, of which decoders know nothing."""
    return {**kwargs, "return_dict": False} if takes_return_dict(type(network).forward) else dict(kwargs)


def takes_return_dict(forward: Callable[..., Any]) -> bool:
    """Whether a network's `forward` may be told to return a tuple; one that may not returns its only tensor."""
    parameters = signature_of(forward).parameters
    return "return_dict" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def signature_of(forward: Callable[..., Any]) -> inspect.Signature:
    """`inspect.signature`, made once for a class's method: it is asked for at every call of a network.

    >>> str(signature_of(nn.Linear(1, 1).forward))
    '(input: torch.Tensor) -> torch.Tensor'
    """
    function = getattr(forward, "__func__", None)
    return inspect.signature(forward) if function is None else _of_method(function)


@lru_cache(maxsize=64)
def _of_method(function: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(function)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def first_output(output: Any) -> Tensor:
    """The tensor that the network computes, whether it returns that alone or first of several."""
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first


def num_classes(denoiser: nn.Module) -> int | None:
    """How many classes the network embeds by their index, 0 to num_classes - 1; None if it embeds none.

    The further row that DiT keeps for "no class" (guidance) is not counted.
    """
    from diffusers.models.embeddings import LabelEmbedding

    for module in denoiser.modules():
        if isinstance(module, LabelEmbedding):
            return int(module.num_classes)
    embedding = getattr(denoiser, "class_embedding", None)
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None

"""The paper's other quantizable operations: the network's output mu, its variance Sigma, and x_{t-1}.

They belong to no layer, so the denoiser carries them as a small module and applies them in hooks around its
`forward`. Source: PTQ4DM (2211.15736), section 3.2 and table 1. One difference is stated: x_{t-1} is rounded where
the network reads it; the sampler, whose scheduler stays an ordinary one, keeps its own copy in float.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from octavo.calibration.observations import SAMPLED_IMAGE
from octavo.calibration.tracing import LEARNED_VARIANCE, NETWORK_OUTPUT, split_output
from octavo.quantization import FakeQuantizer

ATTRIBUTE = "octavo_operations"


def attach_operations(denoiser: nn.Module, quantizers: Mapping[str, FakeQuantizer]) -> None:
    """Let `denoiser` quantize the named operations from now on. Mutates `denoiser`; nothing for an empty mapping."""
    if not quantizers:
        return
    denoiser.add_module(ATTRIBUTE, nn.ModuleDict(dict(quantizers)))
    denoiser.register_forward_pre_hook(_quantize_input, with_kwargs=True)
    denoiser.register_forward_hook(_quantize_output, with_kwargs=True)


def _quantize_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    quantizers = getattr(module, ATTRIBUTE)
    if SAMPLED_IMAGE not in quantizers:
        return args, kwargs
    quantizer = quantizers[SAMPLED_IMAGE]
    if args:
        return (quantizer(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: quantizer(kwargs[name])}


def _quantize_output(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    quantizers = getattr(module, ATTRIBUTE)
    sample = args[0] if args else next(iter(kwargs.values()))
    parts = split_output(output[0], sample.shape[1])
    if not any(name in quantizers for name in (NETWORK_OUTPUT, LEARNED_VARIANCE)):
        return output
    rounded = [quantizers[name](part) if name in quantizers else part for name, part in parts.items()]
    first = torch.cat(rounded, dim=1) if len(rounded) > 1 else rounded[0]
    if isinstance(output, tuple):
        return (first, *output[1:])
    output = copy.copy(output)
    output[next(iter(output.keys()))] = first
    return output

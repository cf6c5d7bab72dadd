"""What a denoiser does beside its layers: the paper's other quantizable operations, and what depends on the timestep.

They belong to no layer, so the denoiser carries them as small modules and applies them in hooks around its `forward`.
Quantized are the network's output mu, its variance Sigma, and x_{t-1} (PTQ4DM, 2211.15736, section 3.2 and table 1).
One difference is stated: x_{t-1} is rounded where the network reads it; the sampler, whose scheduler stays an ordinary
one, keeps its own copy in float. The correction (`OutputCorrection`) comes last, as a part of the sampler would. Groups
of timesteps (`TimestepGroups`) are told the timestep first, for the layers that have a scale for each group.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from octavo.calibration.observations import SAMPLED_IMAGE
from octavo.calibration.tracing import LEARNED_VARIANCE, NETWORK_OUTPUT, split_output
from octavo.diffusion.pairs import TIMESTEP_NAMES
from octavo.errors import OctavoError
from octavo.quantization import OutputCorrection, TimestepGroups, quantized_layers

ATTRIBUTE = "octavo_operations"
OUTPUT_CORRECTION = "output_correction"
TIMESTEP_GROUPS = "timestep_groups"


def attach_operations(denoiser: nn.Module, operations: Mapping[str, nn.Module]) -> None:
    """Let `denoiser` do the named operations from now on, beside those it does. Mutates `denoiser`.

    `operations`: a `FakeQuantizer` by the operation's name, an `OutputCorrection` under OUTPUT_CORRECTION,
    `TimestepGroups` under TIMESTEP_GROUPS. Nothing happens for an empty mapping.
    """
    if not operations:
        return
    if hasattr(denoiser, ATTRIBUTE):
        getattr(denoiser, ATTRIBUTE).update(dict(operations))
        return
    denoiser.add_module(ATTRIBUTE, nn.ModuleDict(dict(operations)))
    denoiser.register_forward_pre_hook(_quantize_input, with_kwargs=True)
    denoiser.register_forward_hook(_change_output, with_kwargs=True)
    denoiser.register_forward_hook(_leave_group, always_call=True)


def attach_timestep_groups(
    denoiser: nn.Module, groups: TimestepGroups, factors: Mapping[str, torch.Tensor]
) -> None:
    """Let each layer of `factors` (quantized layer's name -> float32 [G]) have a scale for each group, from now on.

    Mutates `denoiser`. Such a layer then runs within its network only: that is where the timestep is known.
    """
    layers = dict(quantized_layers(denoiser))
    for name, factor in factors.items():
        layers[name].timestep_factor = factor.to(layers[name].weight_scale.device)
        layers[name].current_group = groups.current
    attach_operations(denoiser, {TIMESTEP_GROUPS: groups})


def output_correction_of(denoiser: nn.Module) -> OutputCorrection | None:
    """The correction that the denoiser's output passes through; None where it is left as it is."""
    operations = dict(getattr(denoiser, ATTRIBUTE, {}))
    return operations.get(OUTPUT_CORRECTION)


def timestep_of(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], asked_by: str = OUTPUT_CORRECTION
) -> torch.Tensor:
    """The timestep that a call of the network tells it: [] or [rows].

    `asked_by`: the recipe's field that needs it. Raises `OctavoError` if the network is told none, or one of another
    shape (one for each token, say).
    """
    named = dict(zip(inspect.signature(type(module).forward).parameters, (module, *args), strict=False))
    told = {**named, **kwargs}
    name = next((name for name in TIMESTEP_NAMES if told.get(name) is not None), None)
    if name is None:
        raise OctavoError(f"{asked_by}: {type(module).__name__} is told no timestep; leave it out")
    timestep = torch.as_tensor(told[name])
    if timestep.ndim > 1:
        raise OctavoError(
            f"{asked_by}: {type(module).__name__} is told timesteps {list(timestep.shape)}, not one for each row; "
            "leave it out"
        )
    return timestep


def _quantize_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    operations = getattr(module, ATTRIBUTE)
    if TIMESTEP_GROUPS in operations:
        operations[TIMESTEP_GROUPS].enter(timestep_of(module, args, kwargs, TIMESTEP_GROUPS))
    if SAMPLED_IMAGE not in operations:
        return args, kwargs
    quantizer = operations[SAMPLED_IMAGE]
    if args:
        return (quantizer(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: quantizer(kwargs[name])}


def _leave_group(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """The call is over, also where it failed."""
    operations = getattr(module, ATTRIBUTE)
    if TIMESTEP_GROUPS in operations:
        operations[TIMESTEP_GROUPS].leave()


def _change_output(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    operations = getattr(module, ATTRIBUTE)
    if not any(name in operations for name in (NETWORK_OUTPUT, LEARNED_VARIANCE, OUTPUT_CORRECTION)):
        return output
    sample = args[0] if args else next(iter(kwargs.values()))
    parts = split_output(output[0], sample.shape[1])
    parts = {name: operations[name](part) if name in operations else part for name, part in parts.items()}
    if OUTPUT_CORRECTION in operations:
        timestep = timestep_of(module, args, kwargs).to(output[0].device)
        parts[NETWORK_OUTPUT] = operations[OUTPUT_CORRECTION](parts[NETWORK_OUTPUT], timestep)
    changed = list(parts.values())
    first = torch.cat(changed, dim=1) if len(changed) > 1 else changed[0]
    if isinstance(output, tuple):
        return (first, *output[1:])
    output = copy.copy(output)
    output[next(iter(output.keys()))] = first
    return output

"""One evaluation of the network, watched: which layers run, in which order, and which are at the edges."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from octavo.calibration.dependence import OTHER, TIMESTEP, Dependence, with_tensor_timestep
from octavo.calibration.labels import tensors_in
from octavo.diffusion import call_arguments, find_denoiser, first_call, first_output
from octavo.errors import OctavoError
from octavo.quantization import attention_calls, walk

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import DiffusionPipeline

NETWORK_OUTPUT, LEARNED_VARIANCE = "network_output", "learned_variance"
IMAGE = "image"
"""Source of tensors: the network's first argument."""
LAYER = "layer:"
"""What the name of a layer as a source of tensors begins with."""


@dataclass(frozen=True)
class Trace:
    """What one evaluation shows.

    executed    names of the convolutions and linears that ran, in order, each once.
    edges       those that read the image and write the output.
    has_variance  the network predicts a variance beside its output.
    attention   names of the modules that called torch's attention, in order, each once.
    timestep_layers  those of the executed whose inputs depend on the timestep alone (`octavo.calibration.dependence`).
    unread      those of the executed that the network's output does not depend on (QwenImage's last text states).
    constant    those whose inputs depend on nothing of what the network is handed but its shapes (how Stable Video
                Diffusion embeds the numbers of the frames).
    """

    executed: tuple[str, ...]
    edges: tuple[str, ...]
    has_variance: bool
    attention: tuple[str, ...] = ()
    timestep_layers: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    constant: tuple[str, ...] = ()


def trace(pipeline: DiffusionPipeline, inputs: Mapping[str, Any] | None = None) -> Trace:
    """Evaluate the pipeline's denoiser once, on its first call for one image. Nothing is changed."""
    _, denoiser = find_denoiser(pipeline)
    return trace_network(denoiser, first_call(pipeline, inputs=inputs)[1])


def trace_network(denoiser: nn.Module, kwargs: Mapping[str, Any]) -> Trace:
    """Evaluate a network once, on the call given. Nothing is changed.

    Raises `OctavoError` for a layer whose input comes by keyword (AnimateDiff): hooks on layers are not told of it.
    """
    kwargs, sources = with_tensor_timestep(kwargs)
    dependence = Dependence(sources)
    for tensor in tensors_in(next(iter(kwargs.values()))):
        dependence.add(tensor, IMAGE)
    ran: list[tuple[str, bool, bool]] = []
    depends_on: dict[str, frozenset[str]] = {}
    attention: list[str] = []
    by_keyword: list[str] = []

    def recorder(name: str) -> Any:
        def record(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if not args:
                by_keyword.append(name)
                return
            of = dependence.of(args[0])
            ran.append((name, args[0].ndim > 2, IMAGE in of))
            depends_on[name] = depends_on.get(name, frozenset()) | of & {TIMESTEP, OTHER}

        return record

    def marker(name: str) -> Any:
        return lambda module, args, output: dependence.add(output, f"{LAYER}{name}")

    hooks: list[Any] = []
    for name, layer in walk(denoiser):
        hooks += [
            layer.register_forward_pre_hook(recorder(name)),
            layer.register_forward_hook(marker(name)),
        ]
    try:
        with (
            torch.inference_mode(),
            evaluating(denoiser),
            attention_calls(denoiser, lambda owner, *_: attention.append(owner)),
            dependence,
        ):
            returned = denoiser(**call_arguments(denoiser, kwargs))
            read = frozenset[str]().union(*(dependence.of(tensor) for tensor in tensors_in(returned)))
    finally:
        for hook in hooks:
            hook.remove()
    if by_keyword:
        raise OctavoError(
            f"{by_keyword[0]}: {type(denoiser).__name__} hands its input over by keyword, which Octavo does not "
            "follow; this network cannot be quantized"
        )
    sample, output = next(iter(kwargs.values())), first_output(returned)
    executed = tuple(dict.fromkeys(name for name, *_ in ran))
    return Trace(
        executed,
        edge_layers(ran),
        LEARNED_VARIANCE in split_output(output, sample.shape[1]),
        tuple(dict.fromkeys(attention)),
        tuple(name for name, sources in depends_on.items() if sources == {TIMESTEP}),
        tuple(name for name in executed if f"{LAYER}{name}" not in read),
        tuple(name for name in executed if not depends_on[name]),
    )


def edge_layers(ran: list[tuple[str, bool, bool]]) -> tuple[str, ...]:
    """The layers that read the image and write the output: first and last to run on more than [rows, features].

    `ran`: (layer name, has positions beside rows and features, what it reads comes from the image) in order of
    execution. Layers on [rows, features] embed the timestep and conditions; some on more embed a text before the image.

    >>> edge_layers([("text", True, False), ("in", True, True), ("mid", True, True), ("out", True, True)])
    ('in', 'out')
    """
    spatial = [(name, of_image) for name, has_positions, of_image in ran if has_positions]
    first = next((name for name, of_image in spatial if of_image), None)
    return () if first is None else tuple(dict.fromkeys([first, spatial[-1][0]]))


def split_output(output: torch.Tensor, in_channels: int) -> dict[str, torch.Tensor]:
    """The network's output [rows, C, ...] as prediction and, where it has 2 x in_channels, learned variance."""
    if output.ndim > 2 and output.shape[1] == 2 * in_channels:
        prediction, variance = output.chunk(2, dim=1)
        return {NETWORK_OUTPUT: prediction, LEARNED_VARIANCE: variance}
    return {NETWORK_OUTPUT: output}


@contextmanager
def hooked(hooks: Collection[RemovableHandle]) -> Iterator[None]:
    """Within the block these hooks are on their modules; afterwards none is."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Within the block every module of `network` is in evaluation mode; afterwards each is as it was."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True

"""Two networks made of one: the whole one, which gives its deep features too, and the outer part, which takes them.

A U-Net's outer part computes the first `depth` skip connections (the first is conv_in's output) and the last `depth`
resnets of the way up, which read them; all within is left out, and the hidden state in front of the first of those
resnets is what is passed on (DeepCache, 2312.00858, section 3.2). A transformer's outer part computes `depth` blocks
at either end, and what the blocks between them add to the hidden states is passed on.

Both networks are of subclasses of the network's own class, share its tensors, and keep the names of its layers. What
is left out becomes modules that return the deep features or their own input, so that diffusers' own `forward` runs on
either; what that computes of no use is not in an engine's graph.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import nn

from octavo.errors import OctavoError
from octavo.runtimes.network import shared_copy

DEEP = "deep_features"
HOLDER = "_octavo_deep"
FROM_OUTSIDE = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)
"""What ControlNet and adapters add within the network."""


APART = ("skip_conv", "temp_convs", "motion_modules")
"""What blocks have whose skip connections are not those of a plain 2-D U-Net."""


class Holder(threading.local):
    """Where the deep features lie while a network is evaluated, by each thread apart."""

    value: torch.Tensor | None = None
    entered: torch.Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Holder:
        return Holder()

    def take(self) -> torch.Tensor:
        """The deep features, which are forgotten."""
        value, self.value, self.entered = self.value, None, None
        assert value is not None
        return value


class LeftOut(nn.Module):
    """In place of what is not computed: returns the deep features, or what it was given, as often as is asked for."""

    def __init__(self, holder: Holder, *, gives: str, skips: int = 0, resnets: int = 0) -> None:
        super().__init__()
        self.__dict__[HOLDER] = holder
        self.gives, self.skips = gives, skips
        self.resnets = nn.ModuleList(nn.Identity() for _ in range(resnets))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        out = given if self.gives == "input" else self.__dict__[HOLDER].value
        if self.gives == "sum":
            out = given + out
        if self.skips:
            return out, (out,) * self.skips
        return (out,) if kwargs.get("return_dict") is False else out


def most_depth(denoiser: nn.Module) -> int:
    """The largest `depth` that leaves anything to reuse. Raises `OctavoError` for a network that cannot be cut."""
    if _is_unet(denoiser):
        up_blocks: Any = denoiser.up_blocks
        return sum(len(block.resnets) for block in up_blocks)
    blocks = _blocks(denoiser)
    return (len(blocks) - 1) // 2


def recording(denoiser: nn.Module, depth: int) -> nn.Module:
    """The whole network: called like `denoiser` it returns the tuple (*its outputs, deep features).

    Raises `OctavoError` for a network that cannot be cut, or a depth that leaves nothing to reuse.
    """
    _check(denoiser, depth)
    network, holder = shared_copy(denoiser), Holder()
    if _is_unet(network):
        _record(_source(network, depth), holder)
    else:
        blocks = _blocks(network)
        _record_sum(blocks[depth], blocks[len(blocks) - 1 - depth], holder)
    return _become(network, holder, takes=False)


def reusing(denoiser: nn.Module, depth: int) -> nn.Module:
    """The outer part: called like `denoiser`, with `deep_features` besides, it returns the tuple (its outputs).

    Raises as `recording` does.
    """
    _check(denoiser, depth)
    network, holder = shared_copy(denoiser), Holder()
    if _is_unet(network):
        _leave_out_of_unet(network, depth, holder)
    else:
        blocks = _blocks(network)
        for i in range(depth, len(blocks) - depth):
            blocks[i] = LeftOut(holder, gives="sum" if i == depth else "input")
    return _become(network, holder, takes=True)


def _check(denoiser: nn.Module, depth: int) -> None:
    most = most_depth(denoiser)
    if not 1 <= depth <= most:
        name = type(denoiser).__name__
        raise OctavoError(f"depth: {depth} is not between 1 and {most}, what leaves part of {name} to reuse")


def _is_unet(denoiser: nn.Module) -> bool:
    if not all(hasattr(denoiser, name) for name in ("down_blocks", "mid_block", "up_blocks")):
        return False
    blocks = (*denoiser.down_blocks, *denoiser.up_blocks)  # type: ignore[misc]
    plain = all(hasattr(block, "resnets") and not any(hasattr(block, a) for a in APART) for block in blocks)
    if not plain or not isinstance(getattr(denoiser, "conv_in", None), nn.Conv2d):
        raise OctavoError(
            f"{type(denoiser).__name__}: blocks of kind {type(blocks[0]).__name__} cannot be cut; leave reuse out"
        )
    return True


def _blocks(denoiser: nn.Module) -> nn.ModuleList:
    blocks = getattr(denoiser, "transformer_blocks", None)
    single = getattr(denoiser, "single_transformer_blocks", None)
    joint = blocks and "encoder_hidden_states" in inspect.signature(type(blocks[0]).forward).parameters
    if isinstance(blocks, nn.ModuleList) and not single and not (joint and _returns_two(blocks[0])):
        return blocks
    raise OctavoError(
        f"{type(denoiser).__name__}: is neither a U-Net of up and down blocks nor a transformer of plain blocks, so "
        "that it cannot be cut; leave reuse out"
    )


def _returns_two(block: nn.Module) -> bool:
    """Joint blocks, as SD3's, carry the text beside the image."""
    return "tuple" in str(inspect.signature(type(block).forward).return_annotation)


def _source(network: Any, depth: int) -> nn.Module:
    """What computes the hidden state in front of the first resnet of the outer part."""
    block, index = _first_kept(network, depth)
    if index:
        within = network.up_blocks[block]
        attentions = getattr(within, "attentions", None)
        source: nn.Module = (attentions if attentions else within.resnets)[index - 1]
    else:
        source = network.up_blocks[block - 1] if block else network.mid_block
    return source


def _first_kept(network: Any, depth: int) -> tuple[int, int]:
    """The up block and the resnet in it with which the outer part begins."""
    left = depth
    for block in range(len(network.up_blocks) - 1, -1, -1):
        count = len(network.up_blocks[block].resnets)
        if left <= count:
            return block, count - left
        left -= count
    raise AssertionError("depth was checked")


def _leave_out_of_unet(network: Any, depth: int, holder: Holder) -> None:
    skips = 1
    for number, block in enumerate(network.down_blocks):
        made = len(block.resnets) + (1 if block.downsamplers is not None else 0)
        if skips >= depth:
            network.down_blocks[number] = LeftOut(holder, gives="input", skips=made)
        else:
            _leave_out_of_block(block, range(depth - skips, len(block.resnets)), holder, "input")
            if block.downsamplers is not None and depth - skips <= len(block.resnets):
                block.downsamplers = nn.ModuleList([LeftOut(holder, gives="input")])
        skips += made
    network.mid_block = LeftOut(holder, gives="input")
    first, index = _first_kept(network, depth)
    for number in range(first):
        count = len(network.up_blocks[number].resnets)
        network.up_blocks[number] = LeftOut(holder, gives="deep", resnets=count)
    _leave_out_of_block(network.up_blocks[first], range(index), holder, "deep")
    if not first and not index:
        network.mid_block = LeftOut(holder, gives="deep")


def _leave_out_of_block(block: Any, indices: range, holder: Holder, gives: str) -> None:
    for i in indices:
        block.resnets[i] = LeftOut(holder, gives=gives)
        if getattr(block, "attentions", None):
            block.attentions[i] = LeftOut(holder, gives=gives)


def _record(module: nn.Module, holder: Holder) -> None:
    """From now on `module` leaves its output in the holder."""
    plain = type(module).forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        self.__dict__[HOLDER].value = out[0] if isinstance(out, tuple) else out
        return out

    _subclass(module, "Recording", forward, holder)


def _record_sum(first: nn.Module, last: nn.Module, holder: Holder) -> None:
    """From now on the holder is left what the blocks `first` to `last` add to the hidden states."""
    plain_first = type(first).forward

    def enter(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.__dict__[HOLDER].entered = args[0] if args else kwargs["hidden_states"]
        return plain_first(self, *args, **kwargs)

    _subclass(first, "Entered", enter, holder)
    plain_last = type(last).forward  # where first is last, that which was just made

    def leave(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = plain_last(self, *args, **kwargs)
        self.__dict__[HOLDER].value = out - self.__dict__[HOLDER].entered
        return out

    _subclass(last, "Recording", leave, holder)


def _become(network: nn.Module, holder: Holder, *, takes: bool) -> nn.Module:
    """The network as one of a subclass whose `forward` gives, or takes, the deep features."""
    plain = type(network).forward
    signature = inspect.signature(plain)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        given = signature.bind(self, *args, **{key: v for key, v in kwargs.items() if key != DEEP}).arguments
        for name in FROM_OUTSIDE:
            if given.get(name) is not None:
                raise OctavoError(
                    f"{name}: what ControlNet or an adapter adds cannot be reused; leave reuse out"
                )
        kwargs["return_dict"] = False
        if takes:
            self.__dict__[HOLDER].value = kwargs.pop(DEEP)
            outputs = plain(self, *args, **kwargs)
            self.__dict__[HOLDER].take()
            return tuple(outputs)
        outputs = plain(self, *args, **kwargs)
        return (*outputs, self.__dict__[HOLDER].take())

    if takes:
        parameters = list(signature.parameters.values())
        at = next(
            (i for i, p in enumerate(parameters) if p.kind is inspect.Parameter.VAR_KEYWORD), len(parameters)
        )
        parameters.insert(at, inspect.Parameter(DEEP, inspect.Parameter.KEYWORD_ONLY, default=None))
        signature_with = signature.replace(parameters=parameters)
    else:
        signature_with = signature
    forward.__signature__ = signature_with  # type: ignore[attr-defined]
    _subclass(network, "Reusing" if takes else "Recording", forward, holder)
    return network


def _subclass(module: nn.Module, name: str, forward: Any, holder: Holder) -> None:
    cls = type(module)
    module.__class__ = type(
        f"{name}{cls.__name__}",
        (cls,),
        {"forward": forward, "__module__": __name__, "__qualname__": f"{name}{cls.__qualname__}"},
    )
    module.__dict__[HOLDER] = holder
